"""U-Nets behind the interface of their graphs, and what of them is refused because its pipeline does not fit."""

from __future__ import annotations

from typing import Any

from trimtab.errors import ExportError
from trimtab.export.modules import Denoiser
from trimtab.export.sizes import latent_space
from trimtab.export.source import Source
from trimtab.export.unet_modules import (
    ConditionalUNet,
    ControlledUNet,
    ControlledXLUNet,
    DreamLiteUNet,
    EditingUNet,
    GuidedUNet,
    InpaintingUNet,
    PixelUNet,
    XLEditingUNet,
    XLInpaintingUNet,
    XLRefiningUNet,
    XLUNet,
)


def pixel_unet(source: Source, unet: Any) -> Denoiser:
    _check_classes(unet)
    return PixelUNet(unet)


def conditional_unet(source: Source, unet: Any) -> Denoiser:
    _check_told(unet, addition_embed_type="text")
    inpainting = _reads_mask(source, unet)
    if unet.config.time_cond_proj_dim is not None:
        return GuidedUNet(unet)
    return InpaintingUNet(unet) if inpainting else ConditionalUNet(unet)


def xl_unet(source: Source, unet: Any) -> Denoiser:
    _check_told(unet)
    inpainting, factor = _reads_mask(source, unet), latent_space(source)[1]
    if refines(source):
        if inpainting or unet.config.time_cond_proj_dim is not None:
            raise ExportError(
                "the U-Net reads a mask or the guidance scale, and a refiner is supported that reads neither: give that"
            )
        return XLRefiningUNet(unet, factor)
    return XLInpaintingUNet(unet, factor) if inpainting else XLUNet(unet, factor)


def editing_unet(source: Source, unet: Any) -> Denoiser:
    _check_told(unet, addition_embed_type="text")
    _check_edits(source, unet)
    return EditingUNet(unet)


def editing_xl_unet(source: Source, unet: Any) -> Denoiser:
    _check_told(unet)
    _check_edits(source, unet)
    return XLEditingUNet(unet, latent_space(source)[1])


def dreamlite(source: Source, unet: Any) -> Denoiser:
    """Refuses what its pipeline does not run, or runs otherwise (Raises ExportError)."""
    _check_told(unet, addition_embed_type="time", encoder_hid_dim_type="text_proj_rms")
    channels, factor = latent_space(source)
    if (found := (unet.config.in_channels, unet.config.out_channels)) != (channels, channels):
        raise ExportError(
            f"the U-Net takes {found[0]} channels and predicts {found[1]}, and {channels} are needed with this vae: "
            "give another"
        )
    alone = unet.config.only_cross_attention
    if any(alone) if isinstance(alone, list | tuple) else alone:
        raise ExportError(
            "the U-Net has only_cross_attention, whose layers read a text's padding too, and one that reads words "
            "alone is supported: give another"
        )
    return DreamLiteUNet(unet, factor)


def controlled_unet(source: Source, unet: Any, controlnet: Any) -> Denoiser:
    plain = conditional_unet(source, unet)
    _check_controlled(source, plain, controlnet)
    return ControlledUNet(unet, controlnet)


def controlled_xl_unet(source: Source, unet: Any, controlnet: Any) -> Denoiser:
    plain = xl_unet(source, unet)
    _check_controlled(source, plain, controlnet)
    return ControlledXLUNet(unet, controlnet, latent_space(source)[1])


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
                f"the U-Net has {name} {found!r}, and its pipeline tells it no such thing (None or {value!r} is "
                "supported): give another pipeline"
            )


def _reads_mask(source: Source, unet: Any) -> bool:
    """Whether a U-Net reads mask and masked picture beside the sample (Raises ExportError for other channels)."""
    channels = latent_space(source)[0]
    if unet.config.in_channels not in (channels, 2 * channels + 1):
        raise ExportError(
            f"the U-Net takes {unet.config.in_channels} channels, and {channels} (plain) or {2 * channels + 1} "
            "(inpainting) are supported: depth and upscaling models are not"
        )
    inpainting = bool(unet.config.in_channels != channels)
    if inpainting and unet.config.time_cond_proj_dim is not None:
        raise ExportError(
            f"the U-Net reads a mask ({unet.config.in_channels} channels) and the guidance scale "
            "(time_cond_proj_dim), and one of both is supported: give a plain LCM or a plain inpainting model"
        )
    return inpainting


def _check_edits(source: Source, unet: Any) -> None:
    """Refuses a U-Net that does not read a picture's latents beside the sample, or the guidance scale too.

    Raises:
        ExportError: With the reason.
    """
    wanted = 2 * latent_space(source)[0]
    if unet.config.in_channels != wanted:
        raise ExportError(
            f"the U-Net takes {unet.config.in_channels} channels, and {source.pipeline_class} gives it {wanted}, its "
            "sample's and a picture's: give another pipeline"
        )
    if unet.config.time_cond_proj_dim is not None:
        raise ExportError(
            "the U-Net reads a picture and the guidance scale (time_cond_proj_dim), and one of both is supported: give "
            "another"
        )


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


def refines(source: Source) -> bool:
    """Whether an SDXL pipeline is a refiner's, which is told how beautiful a picture is to be."""
    return bool(source.index.get("requires_aesthetics_score"))


def conditions(source: Source) -> int:
    """How many numbers SDXL's U-Net is told: the size, what was cut off, and the size asked for, or a score."""
    return 5 if refines(source) else 6


def check_conditions(source: Source) -> None:
    """Refuses an SDXL U-Net that is told something else beside the text than its pipeline tells it.

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
    if found != conditions(source):
        raise ExportError(
            f"the U-Net reads {found:g} conditions beside the text, and {conditions(source)} are what its pipeline "
            "gives (6, or 5 of a refiner, whose model_index.json says requires_aesthetics_score): save it as it is run"
        )
