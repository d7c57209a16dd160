"""A pipeline's denoiser as the torch module that is traced: what calibration and distillation train as well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from trimtab.errors import ExportError, InputError, TrimtabError
from trimtab.export.modules import Denoiser
from trimtab.export.source import Source
from trimtab.export.transformer_modules import (
    CONDITIONED_SIZE,
    ClassTransformer,
    FluxTransformer,
    PixArtTransformer,
    SanaSprintTransformer,
    SanaTransformer,
    SD3Transformer,
)
from trimtab.export.unet_modules import (
    ConditionalUNet,
    ControlledUNet,
    ControlledXLUNet,
    GuidedUNet,
    InpaintingUNet,
    PixelUNet,
    XLInpaintingUNet,
    XLUNet,
)

logger = logging.getLogger(__name__)

_AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
"""Of the others, ConsistencyDecoderVAE samples, and AsymmetricAutoencoderKL reads the picture beside the latents."""

CONTROLNET = "controlnet"
"""The component of a pipeline that draws along a picture."""


def denoiser_name(source: Source) -> str:
    """The component that is run step after step: "unet" or "transformer"."""
    return "transformer" if "transformer" in source.index else "unet"


def latent_space(source: Source) -> tuple[int, int]:
    """Channels of a latent, and pixels to a latent along a side; of a pipeline of pixels latents are pictures.

    Raises:
        InputError: A configuration cannot be read, or the pipeline lacks its autoencoder.
        ExportError: An autoencoder that does more than decode its latents.
    """
    pixels = _WRAPPERS.get(source.pipeline_class) is _pixel_unet
    name = denoiser_name(source) if pixels else "vae"
    config = source.config(name)
    supported = ("AutoencoderDC",) if _WRAPPERS.get(source.pipeline_class) is _sana else _AUTOENCODERS
    if name == "vae" and source.class_name(name) not in supported:
        raise ExportError(
            f"the pipeline's vae is {source.class_name(name)}, and {' or '.join(supported)} is needed: "
            "save the pipeline with that"
        )
    try:
        if name == "vae":
            # AutoencoderTiny and AutoencoderDC have two lists; the former's is written once more under others' name.
            levels = config.get("block_out_channels") or config.get("decoder_block_out_channels")
            if not levels:
                raise KeyError("block_out_channels")
            return int(config["latent_channels"]), 2 ** (len(levels) - 1)
        return int(config["in_channels"]), 1
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source.folder} has a {name} configuration that lacks {error}: copy the pipeline again"
        ) from None


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
        return [denoiser_name(source)]
    if source.class_name(CONTROLNET) != "ControlNetModel":
        raise ExportError(
            f"the controlnet is a {source.class_name(CONTROLNET)}, and one ControlNetModel is supported: save the "
            "pipeline with one"
        )
    return [denoiser_name(source), CONTROLNET]


def _wrapper(source: Source) -> Callable[..., Denoiser]:
    """Raises ExportError for a pipeline's class that has none."""
    wrap = _WRAPPERS.get(source.pipeline_class)
    if wrap is None:
        raise ExportError(
            f"{source.pipeline_class} is not supported: give one of {', '.join(sorted(_WRAPPERS))}"
        )
    return wrap


def caption_width(transformer: Any) -> int:
    """The width of the text that a PixArt transformer reads: before its projection, or as its attention takes it.

    Raises:
        ExportError: It reads no text.
    """
    _check_reads_text(transformer, "PixArt")
    config = transformer.config
    return int(config.cross_attention_dim if config.caption_channels is None else config.caption_channels)


def _check_reads_text(transformer: Any, name: str) -> None:
    """Raises ExportError for a transformer without attention to the text, which its pipeline draws from."""
    if transformer.config.cross_attention_dim is None:
        raise ExportError(
            "the transformer has no cross_attention_dim, so that it reads no text, and "
            f"{name}'s pipeline draws from one: give another pipeline"
        )


def _pixel_unet(source: Source, unet: Any) -> Denoiser:
    _check_classes(unet)
    return PixelUNet(unet)


def _check_classes(unet: Any) -> None:
    """Raises ExportError for a U-Net that reads classes, which no supported pipeline of U-Nets gives."""
    if unet.class_embedding is not None:
        found = {name: unet.config.get(name) for name in ("class_embed_type", "num_class_embeds")}
        told = ", ".join(f"{name} {value!r}" for name, value in found.items() if value is not None)
        raise ExportError(
            f"the U-Net reads a class ({told}), and U-Nets without classes are supported: give another pipeline, or a "
            "DiT for classes"
        )


def _check_told(unet: Any, **told: str) -> None:
    """Refuses a U-Net that reads more than time, text and what its pipeline tells it.

    Args:
        unet: The model.
        **told: Configuration's field -> the one value, beside None, that the pipeline serves.

    Raises:
        ExportError: It reads something else.
    """
    _check_classes(unet)
    for name, value in ({"encoder_hid_dim_type": "text_proj"} | told).items():
        if (found := unet.config[name]) not in (None, value):
            raise ExportError(
                f"the U-Net has {name} {found!r}, and its pipeline gives it text alone (None or {value!r}): "
                "give another pipeline"
            )


def _unet(source: Source, unet: Any) -> Denoiser:
    _check_told(unet, addition_embed_type="text")
    inpainting = _reads_mask(source, unet)
    if unet.config.time_cond_proj_dim is not None:
        return GuidedUNet(unet)
    return InpaintingUNet(unet) if inpainting else ConditionalUNet(unet)


def _xl_unet(source: Source, unet: Any) -> Denoiser:
    _check_told(unet)
    wrapper = XLInpaintingUNet if _reads_mask(source, unet) else XLUNet
    return wrapper(unet, latent_space(source)[1])


def _check_channels(source: Source, transformer: Any, packed: int = 1, variance: bool = False) -> None:
    """Refuses a transformer for other channels than those of its pipeline's latents.

    Args:
        source: The pipeline.
        transformer: Its model.
        packed: Latents of one token that are stacked along channels, as Flux does.
        variance: Its pipeline takes a prediction with a learned variance behind it.

    Raises:
        ExportError: It takes or predicts others.
    """
    channels = latent_space(source)[0] * packed
    taken = transformer.config.in_channels
    predicted = transformer.config.out_channels or taken
    if taken != channels or predicted not in (channels, channels * (1 + variance)):
        raise ExportError(
            f"the transformer takes {taken} channels and predicts {predicted}, and {channels} are needed for the "
            "latents of this vae: models that read a picture, a mask or depth beside them are not supported"
        )


def _sd3(source: Source, transformer: Any) -> Denoiser:
    _check_channels(source, transformer)
    return SD3Transformer(transformer)


def _flux(source: Source, transformer: Any) -> Denoiser:
    _check_channels(source, transformer, packed=4)
    return FluxTransformer(transformer)


def _dit(source: Source, transformer: Any) -> Denoiser:
    _check_channels(source, transformer, variance=True)
    return ClassTransformer(transformer)


def _pixart(source: Source, transformer: Any) -> Denoiser:
    sample_size = transformer.config.sample_size
    if transformer.use_additional_conditions and sample_size != CONDITIONED_SIZE:
        raise ExportError(
            f"the transformer reads the picture's size (use_additional_conditions) and has sample_size {sample_size}, "
            f"and PixArt's pipeline tells it to models of {CONDITIONED_SIZE}: save it with the right one"
        )
    _check_channels(source, transformer, variance=True)
    caption_width(transformer)  # refuses one that reads no text
    return PixArtTransformer(transformer, latent_space(source)[1])


def _sana(source: Source, transformer: Any) -> Denoiser:
    sprint = source.pipeline_class == "SanaSprintPipeline"
    _check_channels(source, transformer, variance=not sprint)
    if bool(transformer.config.guidance_embeds) != sprint:
        raise ExportError(
            f"the transformer has guidance_embeds {transformer.config.guidance_embeds}, and {source.pipeline_class} "
            f"runs one {'with' if sprint else 'without'} it: give another pipeline"
        )
    _check_reads_text(transformer, "Sana")
    return SanaSprintTransformer(transformer) if sprint else SanaTransformer(transformer)


def _controlled_unet(source: Source, unet: Any, controlnet: Any) -> Denoiser:
    plain = _unet(source, unet)
    _check_controlled(source, plain, controlnet)
    return ControlledUNet(unet, controlnet)


def _controlled_xl_unet(source: Source, unet: Any, controlnet: Any) -> Denoiser:
    plain = _xl_unet(source, unet)
    _check_controlled(source, plain, controlnet)
    return ControlledXLUNet(unet, controlnet, latent_space(source)[1])


def _check_controlled(source: Source, unet: Denoiser, controlnet: Any) -> None:
    """Refuses a ControlNet that does more than add to the skips of a plain U-Net.

    Raises:
        ExportError: With the reason.
    """
    if type(unet) not in (ConditionalUNet, XLUNet) or unet.model.config.time_cond_proj_dim:
        raise ExportError(
            "the U-Net reads a mask or the guidance scale, and a ControlNet is supported beside a plain one: give that"
        )
    if controlnet.config.global_pool_conditions:
        raise ExportError(
            "the controlnet has global_pool_conditions, for which diffusers runs it on the prompt's rows alone, and "
            "ControlNets of all rows are supported: give another"
        )
    strides = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    if strides != latent_space(source)[1]:
        raise ExportError(
            f"the controlnet makes its picture {strides} times smaller, and the vae of this pipeline "
            f"{latent_space(source)[1]} times: give one that was trained with this vae"
        )


def _reads_mask(source: Source, unet: Any) -> bool:
    """Whether a U-Net reads mask and masked picture beside the sample (Raises ExportError for other channels)."""
    channels = latent_space(source)[0]
    if unet.config.in_channels not in (channels, 2 * channels + 1):
        raise ExportError(
            f"the U-Net takes {unet.config.in_channels} channels, and {channels} (plain) or {2 * channels + 1} "
            "(inpainting) are supported: depth, upscaling and instruction models are not"
        )
    inpainting = bool(unet.config.in_channels != channels)
    if inpainting and unet.config.time_cond_proj_dim is not None:
        raise ExportError(
            f"the U-Net reads a mask ({unet.config.in_channels} channels) and the guidance scale "
            "(time_cond_proj_dim), and one of both is supported: give a plain LCM or a plain inpainting model"
        )
    return inpainting


SIZE_CONDITIONS = 6
"""Numbers that SDXL's U-Net is told: the picture's size, what was cut off, and the size asked for."""


def check_conditions(source: Source) -> None:
    """Refuses an SDXL U-Net that is told something else than sizes beside the text.

    Raises:
        ExportError: It has other conditions.
    """
    unet, text = source.config("unet"), source.config("text_encoder_2")
    projected, width = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    if unet.get("addition_embed_type") != "text_time" or not projected or not width:
        raise ExportError(
            f"the U-Net has addition_embed_type {unet.get('addition_embed_type')!r}, and SDXL's has 'text_time': "
            "give another pipeline"
        )
    pooled = text.get("projection_dim", 512)  # CLIP's default, which is left out
    found = (projected - pooled) / width
    if found != SIZE_CONDITIONS:
        raise ExportError(
            f"the U-Net reads {found:g} conditions beside the text, and {SIZE_CONDITIONS} are supported, as SDXL's "
            "base has them: an aesthetic score, as refiners have it, is not"
        )


_WRAPPERS: Mapping[str, Callable[..., Denoiser]] = {
    "StableDiffusionPipeline": _unet,
    "StableDiffusionImg2ImgPipeline": _unet,
    "StableDiffusionInpaintPipeline": _unet,
    "LatentConsistencyModelPipeline": _unet,
    "StableDiffusionXLPipeline": _xl_unet,
    "StableDiffusionXLImg2ImgPipeline": _xl_unet,
    "StableDiffusionXLInpaintPipeline": _xl_unet,
    "StableDiffusionControlNetPipeline": _controlled_unet,
    "StableDiffusionControlNetImg2ImgPipeline": _controlled_unet,
    "StableDiffusionControlNetInpaintPipeline": _controlled_unet,
    "StableDiffusionXLControlNetPipeline": _controlled_xl_unet,
    "StableDiffusionXLControlNetImg2ImgPipeline": _controlled_xl_unet,
    "StableDiffusionXLControlNetInpaintPipeline": _controlled_xl_unet,
    "StableDiffusion3Pipeline": _sd3,
    "StableDiffusion3Img2ImgPipeline": _sd3,
    "StableDiffusion3InpaintPipeline": _sd3,
    "FluxPipeline": _flux,
    "FluxImg2ImgPipeline": _flux,
    "FluxInpaintPipeline": _flux,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "SanaPipeline": _sana,
    "SanaSprintPipeline": _sana,
    "DiTPipeline": _dit,
    "DDPMPipeline": _pixel_unet,
    "DDIMPipeline": _pixel_unet,
}
"""Pipeline class -> its wrapper."""
