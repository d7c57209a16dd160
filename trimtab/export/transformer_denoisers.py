"""Transformers behind the interface of their graphs, and what of them is refused because its pipeline does not fit."""

from __future__ import annotations

from typing import Any

from trimtab.errors import ExportError
from trimtab.export.flux_modules import ChromaTransformer, Flux2Transformer, FluxTransformer
from trimtab.export.modules import Denoiser
from trimtab.export.sizes import latent_space
from trimtab.export.source import Source
from trimtab.export.transformer_modules import (
    CONDITIONED_SIZE,
    ClassTransformer,
    PixArtTransformer,
    SanaSprintTransformer,
    SanaTransformer,
    SD3Transformer,
    ZImageTransformer,
)

Z_IMAGE_LENGTH = 512
"""Tokens of Z-Image's text, its template's among them: its pipeline's ``max_sequence_length``."""


def sd3(source: Source, transformer: Any) -> Denoiser:
    _check_channels(source, transformer)
    return SD3Transformer(transformer)


def flux(source: Source, transformer: Any) -> Denoiser:
    _check_flux(source, transformer)
    return FluxTransformer(transformer)


def flux_control(source: Source, transformer: Any) -> Denoiser:
    _check_flux(source, transformer, beside=latent_space(source)[0])
    return FluxTransformer(transformer)


def flux_fill(source: Source, transformer: Any) -> Denoiser:
    channels, factor = latent_space(source)
    pixels = factor**2  # of the mask, stacked along channels
    _check_flux(source, transformer, beside=channels + pixels)
    return FluxTransformer(transformer)


def chroma(source: Source, transformer: Any) -> Denoiser:
    _check_flux(source, transformer)
    if (patch := transformer.config.patch_size) != 1:
        raise ExportError(
            f"the transformer has patch_size {patch}, and Chroma's pipeline, which packs 2x2 latents itself, draws "
            "with 1: give another"
        )
    return ChromaTransformer(transformer)


def flux2(source: Source, transformer: Any) -> Denoiser:
    _check_channels(source, transformer)
    _check_axes(transformer)
    if transformer.config.guidance_embeds:
        raise ExportError(
            "the transformer has guidance_embeds, and Flux.2 klein's pipeline tells it no guidance scale: give another"
        )
    return Flux2Transformer(transformer)


def dit(source: Source, transformer: Any) -> Denoiser:
    _check_channels(source, transformer, variance=True)
    return ClassTransformer(transformer)


def pixart(source: Source, transformer: Any) -> Denoiser:
    sample_size = transformer.config.sample_size
    if transformer.use_additional_conditions and sample_size != CONDITIONED_SIZE:
        raise ExportError(
            f"the transformer reads the picture's size (use_additional_conditions) and has sample_size {sample_size}, "
            f"and PixArt's pipeline tells it to models of {CONDITIONED_SIZE}: save it with the right one"
        )
    _check_channels(source, transformer, variance=True)
    caption_width(transformer)  # refuses one that reads no text
    return PixArtTransformer(transformer, latent_space(source)[1])


def caption_width(transformer: Any) -> int:
    """The width of the text that a PixArt transformer reads: before its projection, or as its attention takes it.

    Raises:
        ExportError: It reads no text.
    """
    _check_reads_text(transformer, "PixArt")
    config = transformer.config
    return int(config.cross_attention_dim if config.caption_channels is None else config.caption_channels)


def sana(source: Source, transformer: Any) -> Denoiser:
    sprint = source.pipeline_class == "SanaSprintPipeline"
    _check_channels(source, transformer, variance=not sprint)
    if bool(transformer.config.guidance_embeds) != sprint:
        raise ExportError(
            f"the transformer has guidance_embeds {transformer.config.guidance_embeds}, and {source.pipeline_class} "
            f"runs one {'with' if sprint else 'without'} it: give another pipeline"
        )
    _check_reads_text(transformer, "Sana")
    return SanaSprintTransformer(transformer) if sprint else SanaTransformer(transformer)


def z_image(source: Source, transformer: Any) -> Denoiser:
    _check_channels(source, transformer)
    config = transformer.config
    if config.siglip_feat_dim is not None:
        raise ExportError(
            "the transformer reads pictures (siglip_feat_dim), and one of text alone is supported"
        )
    if ZImageTransformer.PATCH not in transformer.all_x_embedder:
        raise ExportError(
            f"the transformer has patches of {config.all_patch_size}, and Z-Image's pipeline draws with 2: give another"
        )
    if config.axes_lens[0] < Z_IMAGE_LENGTH + 2:  # of text and, behind it, of the picture
        raise ExportError(
            f"the transformer knows {config.axes_lens[0]} positions of text (axes_lens), and Z-Image's pipeline gives "
            f"{Z_IMAGE_LENGTH}: give another"
        )
    return ZImageTransformer(transformer)


def _check_flux(source: Source, transformer: Any, beside: int = 0) -> None:
    """`_check_channels` of a model whose pipeline packs 2x2 latents into a token, and `_check_axes`."""
    _check_channels(source, transformer, packed=4, beside=beside)
    _check_axes(transformer)


def _check_axes(transformer: Any) -> None:
    """Raises ExportError where a position's axes do not share out the width of a head, as rotations need it."""
    axes, width = transformer.config.axes_dims_rope, transformer.config.attention_head_dim
    if sum(axes) != width:
        raise ExportError(
            f"the transformer's heads are {width} wide, and its axes_dims_rope {tuple(axes)} add up to {sum(axes)}: "
            "give one in which they agree"
        )


def _check_channels(
    source: Source, transformer: Any, packed: int = 1, variance: bool = False, beside: int = 0
) -> None:
    """Refuses a transformer for other channels than those of its pipeline's latents.

    Args:
        source: The pipeline.
        transformer: Its model.
        packed: Latents of one token that are stacked along channels, as Flux does.
        variance: Its pipeline takes a prediction with a learned variance behind it.
        beside: Channels of what it reads beside the latents.

    Raises:
        ExportError: It takes or predicts others.
    """
    channels = latent_space(source)[0] * packed
    needed = channels + beside * packed
    taken = transformer.config.in_channels
    predicted = getattr(transformer.config, "out_channels", None) or taken
    if taken != needed or predicted not in (channels, channels * (1 + variance)):
        needs = f"{needed} and {channels}" if beside else str(channels)
        raise ExportError(
            f"the transformer takes {taken} channels and predicts {predicted}, and {needs} are needed for "
            f"{source.pipeline_class} with this vae: a model that reads something else beside the latents is another "
            "pipeline's"
        )


def _check_reads_text(transformer: Any, name: str) -> None:
    """Raises ExportError for a transformer without attention to the text, which its pipeline draws from."""
    if transformer.config.cross_attention_dim is None:
        raise ExportError(
            "the transformer has no cross_attention_dim, so that it reads no text, and "
            f"{name}'s pipeline draws from one: give another pipeline"
        )
