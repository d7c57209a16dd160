"""The pipeline families."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trimtab.export.parts import PipelineParts
from trimtab.export.source import Source
from trimtab.export.transformer_pipelines import dit, flux, flux2, pixart, sana, stable_diffusion_3, z_image
from trimtab.export.unet_pipelines import stable_diffusion, stable_diffusion_xl, unconditional


def has_guidance(source: Source) -> bool:
    """Whether a pipeline has a guidance scale, of whichever kind, by its configurations.

    Raises:
        InputError: A configuration is missing or cannot be read.
    """
    family = FAMILIES.get(source.pipeline_class)
    if family is flux:
        return bool(source.config(source.denoiser).get("guidance_embeds"))
    if family is flux2:
        return not source.index.get("is_distilled")
    return family is not unconditional


FAMILIES: Mapping[str, Callable[[PipelineParts], None]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionImg2ImgPipeline": stable_diffusion,
    "StableDiffusionInpaintPipeline": stable_diffusion,
    "LatentConsistencyModelPipeline": stable_diffusion,
    "LatentConsistencyModelImg2ImgPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusionXLImg2ImgPipeline": stable_diffusion_xl,
    "StableDiffusionXLInpaintPipeline": stable_diffusion_xl,
    "StableDiffusionControlNetPipeline": stable_diffusion,
    "StableDiffusionControlNetImg2ImgPipeline": stable_diffusion,
    "StableDiffusionControlNetInpaintPipeline": stable_diffusion,
    "StableDiffusionXLControlNetPipeline": stable_diffusion_xl,
    "StableDiffusionXLControlNetImg2ImgPipeline": stable_diffusion_xl,
    "StableDiffusionXLControlNetInpaintPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "StableDiffusion3Img2ImgPipeline": stable_diffusion_3,
    "StableDiffusion3InpaintPipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "FluxImg2ImgPipeline": flux,
    "FluxInpaintPipeline": flux,
    "FluxControlPipeline": flux,
    "FluxControlImg2ImgPipeline": flux,
    "FluxControlInpaintPipeline": flux,
    "FluxFillPipeline": flux,
    "FluxKontextPipeline": flux,
    "Flux2KleinPipeline": flux2,
    "PixArtAlphaPipeline": pixart,
    "PixArtSigmaPipeline": pixart,
    "SanaPipeline": sana,
    "SanaSprintPipeline": sana,
    "ZImagePipeline": z_image,
    "ZImageImg2ImgPipeline": z_image,
    "ZImageInpaintPipeline": z_image,
    "DiTPipeline": dit,
    "DDPMPipeline": unconditional,
    "DDIMPipeline": unconditional,
}
"""Pipeline class -> family."""
