"""A pipeline's denoiser as the torch module that is traced: what calibration and distillation train as well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from trimtab.errors import ExportError, TrimtabError
from trimtab.export import transformer_denoisers as transformers
from trimtab.export import unet_denoisers as unets
from trimtab.export.modules import Denoiser
from trimtab.export.source import Source

logger = logging.getLogger(__name__)

CONTROLNET = "controlnet"
"""The component of a pipeline that draws along a picture."""


def check_denoiser(source: Source) -> None:
    """Refuses what `denoiser_module` would refuse, by the configuration alone: before anything is loaded.

    Raises:
        InputError: A configuration is missing or cannot be read.
        ExportError: The pipeline's class is not supported, or its U-Net takes other channels or reads classes.
    """
    wrap = _wrapper(source)
    try:
        models = [source.hollow(name) for name in _models(source)]
    except TrimtabError:
        raise
    except Exception as error:  # loading it says what is wrong, if something is
        logger.debug("the denoiser is not checked before it is loaded: %s", error)
        return
    wrap(source, *models)


def denoiser_module(source: Source) -> Denoiser:
    """Loads a pipeline's denoiser, in float32 and eval mode, behind its graph's own interface.

    It takes the denoiser graph's inputs by keyword (before `FuseSampler`: ``sample``, ``timestep``, ...) and
    gives its ``prediction``; the model itself is the attribute ``model``, whose parameters have the names of
    the graph's initializers.

    Args:
        source: The pipeline.

    Raises:
        InputError: The component is missing or damaged.
        ExportError: The pipeline's class is not supported, or its U-Net takes other channels or reads classes.
    """
    return _wrapper(source)(source, *(source.load(name) for name in _models(source)))


def _models(source: Source) -> list[str]:
    """The components that are run step after step (Raises ExportError for several ControlNets, or a joint one)."""
    if "ControlNet" not in source.pipeline_class:
        return [source.denoiser]
    if source.class_name(CONTROLNET) != "ControlNetModel":
        raise ExportError(
            f"the controlnet is a {source.class_name(CONTROLNET)}, and one ControlNetModel is supported: save the "
            "pipeline with one"
        )
    return [source.denoiser, CONTROLNET]


def _wrapper(source: Source) -> Callable[..., Denoiser]:
    """Raises ExportError for a pipeline's class that has none."""
    wrap = WRAPPERS.get(source.pipeline_class)
    if wrap is None:
        raise ExportError(
            f"{source.pipeline_class} is not supported: give one of {', '.join(sorted(WRAPPERS))}"
        )
    return wrap


WRAPPERS: Mapping[str, Callable[..., Denoiser]] = {
    "StableDiffusionPipeline": unets.conditional_unet,
    "StableDiffusionImg2ImgPipeline": unets.conditional_unet,
    "StableDiffusionInpaintPipeline": unets.conditional_unet,
    "LatentConsistencyModelPipeline": unets.conditional_unet,
    "LatentConsistencyModelImg2ImgPipeline": unets.conditional_unet,
    "StableDiffusionXLPipeline": unets.xl_unet,
    "StableDiffusionXLImg2ImgPipeline": unets.xl_unet,
    "StableDiffusionXLInpaintPipeline": unets.xl_unet,
    "StableDiffusionInstructPix2PixPipeline": unets.editing_unet,
    "StableDiffusionXLInstructPix2PixPipeline": unets.editing_xl_unet,
    "StableDiffusionControlNetPipeline": unets.controlled_unet,
    "StableDiffusionControlNetImg2ImgPipeline": unets.controlled_unet,
    "StableDiffusionControlNetInpaintPipeline": unets.controlled_unet,
    "StableDiffusionXLControlNetPipeline": unets.controlled_xl_unet,
    "StableDiffusionXLControlNetImg2ImgPipeline": unets.controlled_xl_unet,
    "StableDiffusionXLControlNetInpaintPipeline": unets.controlled_xl_unet,
    "StableDiffusion3Pipeline": transformers.sd3,
    "StableDiffusion3Img2ImgPipeline": transformers.sd3,
    "StableDiffusion3InpaintPipeline": transformers.sd3,
    "FluxPipeline": transformers.flux,
    "FluxImg2ImgPipeline": transformers.flux,
    "FluxInpaintPipeline": transformers.flux,
    "FluxControlPipeline": transformers.flux_control,
    "FluxControlImg2ImgPipeline": transformers.flux_control,
    "FluxControlInpaintPipeline": transformers.flux_control,
    "FluxFillPipeline": transformers.flux_fill,
    "FluxKontextPipeline": transformers.flux,
    "ChromaPipeline": transformers.chroma,
    "ChromaImg2ImgPipeline": transformers.chroma,
    "ChromaInpaintPipeline": transformers.chroma,
    "Flux2KleinPipeline": transformers.flux2,
    "PixArtAlphaPipeline": transformers.pixart,
    "PixArtSigmaPipeline": transformers.pixart,
    "SanaPipeline": transformers.sana,
    "SanaSprintPipeline": transformers.sana,
    "ZImagePipeline": transformers.z_image,
    "ZImageImg2ImgPipeline": transformers.z_image,
    "ZImageInpaintPipeline": transformers.z_image,
    "DiTPipeline": transformers.dit,
    "DreamLitePipeline": unets.dreamlite,
    "DreamLiteMobilePipeline": unets.dreamlite,
    "DDPMPipeline": unets.pixel_unet,
    "DDIMPipeline": unets.pixel_unet,
}
"""Pipeline class -> its wrapper."""
