"""The denoisers that are traced: thin wrappers that give every graph one plain interface.

The wrapped model is always the attribute ``model``, so that its module paths and parameter names can be
restored by dropping one prefix (`trimtab.export.trace`). Every denoiser takes ``sample`` (rows, C, h, w)
float32 and a scalar ``timestep`` first, and returns a prediction of the sample's shape: what the sampler is
fused to.
"""

# The wrapped models are untyped, and forwards differ by design.
# mypy: disable-error-code="no-any-return, override"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Denoiser(nn.Module):
    """Base of the wrappers around a U-Net or a transformer."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def timestep_rows(timestep: Tensor, sample: Tensor) -> Tensor:
    """The scalar time step as one value a row: (rows,)."""
    return timestep.reshape(1).expand(sample.shape[0])


def for_rows(values: Tensor, sample: Tensor) -> Tensor:
    """What belongs to pictures, (batch, ...) or (1, ...), for every guidance row of a sample: (rows * batch, ...)."""
    return values.repeat(sample.shape[0] // values.shape[0], *[1] * (values.ndim - 1))


def attended(attention: Any, heads: list[Tensor], mask: Tensor | None) -> Tensor:
    """What attention makes of queries, keys and values, (rows, tokens, heads, width) each."""
    query, key, value = (part.transpose(1, 2) for part in heads)
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.to_out[0](mixed.transpose(1, 2).flatten(2))


def pixels(sample: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Height and width of the picture in pixels, (rows, 1) float32 each, taken from the latents' shape."""
    ones = torch.ones_like(sample[:, :1, 0, 0])
    height = ones * sample.shape[2] * factor
    width = ones * sample.shape[3] * factor
    return height, width
