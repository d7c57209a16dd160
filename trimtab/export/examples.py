"""Tensors that graphs are traced with: their sizes stand for all sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from trimtab.export.trace import Example

if TYPE_CHECKING:
    from trimtab.export.parts import Parts

# They differ from each other and from 0 and 1, which torch.export would take for constants.
EVEN_LATENT = (12, 10)
PATCHES = (6, 5)
ROWS = 2
TOKENS = 11


def odd_latent(halvings: int) -> tuple[int, int]:
    """Sides for a U-Net's general path, in which an upsampler is told the size of its skip.

    Three and two halves and one more are 2 where they have been halved to the end: a 1 would be taken for a constant.

    Args:
        halvings: How often the sides are halved, rounded up.
    """
    half = 2 ** max(halvings - 1, 2)
    return 3 * half + 1, 2 * half + 1


def sample_example(channels: int, latent: tuple[int, int] | None = None) -> Example:
    """The denoiser's sample: (rows * batch, channels, h, w)."""
    size = latent or odd_latent(3)
    return Example(torch.randn(ROWS, channels, *size), ("prompts", None, "latent_height", "latent_width"))


def patched_example(parts: Parts) -> Example:
    """A sample of whole patches, and no more of them than a transformer's table of positions has."""
    patch = parts.multiple // parts.factor
    most = max(PATCHES) if parts.largest_side is None else parts.largest_side // parts.multiple
    height, width = (patch * min(count, most) for count in PATCHES)
    return sample_example(parts.channels, (height, width))


def picture_example(parts: Parts) -> Example:
    """Latents of a picture beside a sample of `patched_example`'s."""
    sample = patched_example(parts)
    return replace(sample, dims=("batch", *sample.dims[1:]))


def halving_example(parts: Parts) -> Example:
    """A sample for a U-Net whose upsamplers only double: its sides halve at every level."""
    multiple = parts.multiple // parts.factor
    sample = sample_example(parts.channels, (3 * multiple, 2 * multiple))
    return replace(sample, multiples=dict.fromkeys(("latent_height", "latent_width"), multiple))


def timestep_example() -> Example:
    """The denoiser's time step: a float32 scalar."""
    return Example(torch.tensor(500.0))


def hidden_example(width: int) -> Example:
    """Text embeddings: (rows * batch, tokens, width)."""
    return Example(torch.randn(ROWS, TOKENS, width), ("prompts", "tokens", None))


def pooled_example(width: int) -> Example:
    """Pooled text embeddings: (rows * batch, width)."""
    return Example(torch.randn(ROWS, width), ("prompts", None))


def tokens_example(left_out: int = 0) -> Example:
    """Token ids, (rows * batch, tokens), of which so many more in front are left out of what is encoded."""
    return Example(torch.randint(3, 10, (ROWS, left_out + TOKENS)), ("prompts", "tokens"))


def mask_example(left_out: int = 0) -> Example:
    """Which tokens of `tokens_example` are words: (rows * batch, tokens) int64."""
    mask = torch.ones(ROWS, left_out + TOKENS, dtype=torch.int64)
    mask[0, left_out + TOKENS // 2 :] = 0
    return Example(mask, ("prompts", "tokens"))
