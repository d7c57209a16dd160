"""The sizes of a pipeline's latents and pictures, by its configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import ExportError, InputError
from trimtab.export.parts import PipelineParts
from trimtab.export.source import Source

_AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
"""Of the others, ConsistencyDecoderVAE samples, and AsymmetricAutoencoderKL reads the picture beside the latents."""

_OTHER_AUTOENCODERS = {"Sana": "AutoencoderDC", "Flux2": "AutoencoderKLFlux2", "DreamLite": "AutoencoderTiny"}
"""Begin of a pipeline's class -> the one that it has instead."""

_OF_PIXELS = ("DDPMPipeline", "DDIMPipeline")


def latent_space(source: Source) -> tuple[int, int]:
    """Channels of a latent, and pixels to a latent along a side; of a pipeline of pixels latents are pictures.

    Raises:
        InputError: A configuration cannot be read, or the pipeline lacks its autoencoder.
        ExportError: An autoencoder that does more than decode its latents.
    """
    name = source.denoiser if source.pipeline_class in _OF_PIXELS else "vae"
    config = source.config(name)
    others = [vae for begin, vae in _OTHER_AUTOENCODERS.items() if source.pipeline_class.startswith(begin)]
    supported = others or _AUTOENCODERS
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
            # Flux.2's pipeline draws 2x2 of its autoencoder's latents as one.
            packed = 2 if source.class_name(name) == "AutoencoderKLFlux2" else 1
            return int(config["latent_channels"]) * packed**2, 2 ** (len(levels) - 1) * packed
        return int(config["in_channels"]), 1
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source.folder} has a {name} configuration that lacks {error}: copy the pipeline again"
        ) from None


def measure(parts: PipelineParts) -> None:
    """Channels, pixel factor, native size and what sizes must be multiples of, before anything is loaded.

    Raises:
        InputError: A configuration cannot be read.
    """
    source = parts.source
    name = source.denoiser
    config = source.config(name)
    parts.channels, parts.factor = latent_space(source)
    try:
        if source.has("vae"):
            vae = source.config("vae")
            parts.colors = int(vae.get("out_channels") or vae["in_channels"])  # AutoencoderDC has one of both
            # A transformer's patches; Flux and Chroma pack 2x2 latents before their models see them, and Z-Image names
            # sizes.
            patch = 2 if source.class_name(name) in _PATCHES_OF_2 else int(config.get("patch_size", 1))
            parts.multiple = parts.factor * patch * _halvings(config.get("up_block_types") or ())
            # SD3 cuts what it needs out of a table of so many patches a side.
            if table := config.get("pos_embed_max_size"):
                parts.largest_side = int(table) * parts.multiple
            # Z-Image has tables of positions: along the text, down and across.
            if positions := config.get("axes_lens"):
                parts.largest_side = int(min(positions[1:])) * parts.multiple
        else:
            parts.colors = parts.channels
            # Its upsamplers double, so that a side must halve at every level.
            parts.multiple = 2 ** (len(config["block_out_channels"]) - 1)
        # Flux's configuration says no size, and DreamLite's pipeline reads none: 128 latents of the autoencoder's.
        own = None if source.pipeline_class.startswith("DreamLite") else config.get("sample_size")
        sides = own or (64 if source.pipeline_class.startswith("Flux2") else 128)
        if source.pipeline_class in MENDING and _is_old(config):
            sides = max(sides, 64)
        height, width = (sides, sides) if isinstance(sides, int) else sides
        parts.size = (int(width) * parts.factor, int(height) * parts.factor)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source.folder} has a {name} configuration that lacks {error}: copy the pipeline again"
        ) from None
    if source.pipeline_class == "DiTPipeline":
        parts.fixed_size = "the model's position embeddings are fixed"


_PATCHES_OF_2 = ("FluxTransformer2DModel", "ChromaTransformer2DModel", "ZImageTransformer2DModel")

_TOLD_SIZES = {
    *("UpBlock2D", "CrossAttnUpBlock2D"),
    *("DreamLiteUpBlock2D", "DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
    *("CrossAttnUpRemoveSelfAttnBlock2D", "CrossAttnUpRemoveSelfAttnBlock2DV1"),
}
"""Up blocks that take the size of their skip from the U-Net; others double."""


def _halvings(up_blocks: Sequence[str]) -> int:
    """What a conditional U-Net's sides must be multiples of: behind an upsampler that doubles, the halves of a side."""
    return 1 if _TOLD_SIZES.issuperset(up_blocks[:-1]) else 2 ** (len(up_blocks) - 1)


MENDING = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
"""Pipelines that mend what old configurations say: a size of less than 64 latents, and fields of the scheduler's."""


def _is_old(config: Mapping[str, Any]) -> bool:
    """Whether diffusers before 0.9 wrote a configuration: what it says of one side was often wrong."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    old = version is not None and (int(version[1]), int(version[2])) < (0, 9)
    return old and isinstance(config.get("sample_size"), int)
