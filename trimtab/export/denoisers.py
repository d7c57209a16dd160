"""A pipeline's denoiser as the torch module that is traced: what calibration and distillation train as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trimtab.errors import ExportError, InputError
from trimtab.export import modules
from trimtab.export.source import Source


def denoiser_name(source: Source) -> str:
    """The component that is run step after step: "unet" or "transformer"."""
    return "unet" if source.has("unet") else "transformer"


def latent_space(source: Source) -> tuple[int, int]:
    """Channels of a latent, and pixels to a latent along a side; without an autoencoder latents are pictures.

    Raises:
        InputError: A configuration cannot be read.
    """
    name = "vae" if source.has("vae") else denoiser_name(source)
    config = source.config(name)
    try:
        if name == "vae":
            return int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)
        return int(config["in_channels"]), 1
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source.folder} has a {name} configuration that lacks {error}: copy the pipeline again"
        ) from None


def denoiser_module(source: Source) -> modules.Denoiser:
    """Loads a pipeline's denoiser, in float32 and eval mode, behind its graph's own interface.

    It takes the denoiser graph's inputs by keyword (before `FuseSampler`: ``sample``, ``timestep``, ...) and
    gives its ``prediction``; the model itself is the attribute ``model``, whose parameters have the names of
    the graph's initializers.

    Args:
        source: The pipeline.

    Raises:
        InputError: The component is missing or damaged.
        ExportError: The pipeline's class is not supported, or its U-Net takes other channels.
    """
    wrap = _WRAPPERS.get(source.pipeline_class)
    if wrap is None:
        raise ExportError(
            f"{source.pipeline_class} is not supported: give one of {', '.join(sorted(_WRAPPERS))}"
        )
    return wrap(source, source.load(denoiser_name(source)))


def _unet(source: Source, unet: Any) -> modules.Denoiser:
    if unet.config.time_cond_proj_dim is not None:
        return modules.GuidedUNet(unet, unet.config.time_cond_proj_dim)
    return modules.InpaintingUNet(unet) if _reads_mask(source, unet) else modules.ConditionalUNet(unet)


def _xl_unet(source: Source, unet: Any) -> modules.Denoiser:
    wrapper = modules.XLInpaintingUNet if _reads_mask(source, unet) else modules.XLUNet
    return wrapper(unet, latent_space(source)[1])


def _reads_mask(source: Source, unet: Any) -> bool:
    """Whether a U-Net reads mask and masked picture beside the sample (Raises ExportError for other channels)."""
    channels = latent_space(source)[0]
    if unet.config.in_channels not in (channels, 2 * channels + 1):
        raise ExportError(
            f"the U-Net takes {unet.config.in_channels} channels, and {channels} (plain) or {2 * channels + 1} "
            "(inpainting) are supported: depth, upscaling and instruction models are not"
        )
    return bool(unet.config.in_channels != channels)


_WRAPPERS: Mapping[str, Callable[[Source, Any], modules.Denoiser]] = {
    "StableDiffusionPipeline": _unet,
    "StableDiffusionImg2ImgPipeline": _unet,
    "StableDiffusionInpaintPipeline": _unet,
    "LatentConsistencyModelPipeline": _unet,
    "StableDiffusionXLPipeline": _xl_unet,
    "StableDiffusionXLImg2ImgPipeline": _xl_unet,
    "StableDiffusionXLInpaintPipeline": _xl_unet,
    "StableDiffusion3Pipeline": lambda source, model: modules.SD3Transformer(model),
    "StableDiffusion3Img2ImgPipeline": lambda source, model: modules.SD3Transformer(model),
    "FluxPipeline": lambda source, model: modules.FluxTransformer(model),
    "FluxImg2ImgPipeline": lambda source, model: modules.FluxTransformer(model),
    "PixArtAlphaPipeline": lambda source, model: modules.PixArtTransformer(model, latent_space(source)[1]),
    "PixArtSigmaPipeline": lambda source, model: modules.PixArtTransformer(model, latent_space(source)[1]),
    "DiTPipeline": lambda source, model: modules.ClassTransformer(model),
    "DDPMPipeline": lambda source, model: modules.PixelUNet(model),
    "DDIMPipeline": lambda source, model: modules.PixelUNet(model),
}
"""Pipeline class -> its wrapper."""
