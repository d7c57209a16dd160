"""The pipeline families."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trimtab.export import transformer_denoisers as transformers
from trimtab.export import unet_denoisers as unets
from trimtab.export.denoisers import WRAPPERS
from trimtab.export.modules import Denoiser
from trimtab.export.parts import PipelineParts
from trimtab.export.source import Source
from trimtab.export.transformer_pipelines import (
    chroma,
    dit,
    flux,
    flux2,
    pixart,
    sana,
    stable_diffusion_3,
    z_image,
)
from trimtab.export.unet_pipelines import dreamlite, stable_diffusion, stable_diffusion_xl, unconditional


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
    if family is dreamlite:
        return source.pipeline_class == "DreamLitePipeline"  # the mobile one is distilled
    return family is not unconditional


_OF_WRAPPER: Mapping[Callable[..., Denoiser], Callable[[PipelineParts], None]] = {
    unets.conditional_unet: stable_diffusion,
    unets.editing_unet: stable_diffusion,
    unets.controlled_unet: stable_diffusion,
    unets.xl_unet: stable_diffusion_xl,
    unets.editing_xl_unet: stable_diffusion_xl,
    unets.controlled_xl_unet: stable_diffusion_xl,
    unets.dreamlite: dreamlite,
    unets.pixel_unet: unconditional,
    transformers.sd3: stable_diffusion_3,
    transformers.flux: flux,
    transformers.flux_control: flux,
    transformers.flux_fill: flux,
    transformers.chroma: chroma,
    transformers.flux2: flux2,
    transformers.pixart: pixart,
    transformers.sana: sana,
    transformers.z_image: z_image,
    transformers.dit: dit,
}
"""Wrapper of a denoiser -> the family of its pipelines."""

FAMILIES: Mapping[str, Callable[[PipelineParts], None]] = {
    name: _OF_WRAPPER[wrapper] for name, wrapper in WRAPPERS.items()
}
"""Pipeline class -> family."""
