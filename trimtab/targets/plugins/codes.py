"""Packed codes as the kernels and TensorRT take them: rows of 32-bit words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.passes.vq_op import pack_indices, unpack_indices

ROW_BYTES = 16
"""Rows start at a multiple of it: the widest load that a thread has."""


def row_words(k: int, d: int, bits: int) -> int:
    """Words of one row of codes, as `as_words` pads it.

    Args:
        k: Weights of the row.
        d: Of one codeword.
        bits: Of a code, 8 or 6; those of six come in fours.
    """
    codes = -(-k // d)
    return _padded(codes if bits == 8 else -(-codes // 4) * 3) // 4


def as_words(rows: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Rows of packed codes, each padded with zeros to whole 16 bytes, as words; the bytes stay in their order.

    TensorRT has no constants of UINT8, and INT8 ones only before a DequantizeLinear; INT32 may be anything.

    Args:
        rows: (n, bytes) uint8: the codes of one output channel a row, eight bits each, or four of six bits in
            three bytes, the first code in the lowest bits.

    Returns:
        (n, words) int32, little-endian.
    """
    padded = np.zeros((rows.shape[0], _padded(rows.shape[1])), np.uint8)
    padded[:, : rows.shape[1]] = rows
    return padded.view("<i4").astype(np.int32, copy=False)


def grouped(rows: npt.NDArray[Any], shape: Sequence[int], d: int, bits: int) -> npt.NDArray[np.uint8]:
    """Rows of packed codes (n, bytes) with the taps of one group of channels next to each other, packed again.

    What a codeword's neighbours are decoded to then lies near it in the weight, whose last axes are the taps.

    Args:
        rows: As the graph has them, all channels of one tap after the other.
        shape: (n, channels, taps...); d divides the channels.
        d: Weights of one codeword.
        bits: Of a code, 8 or 6.
    """
    n, groups, taps = shape[0], shape[1] // d, math.prod(shape[2:])
    indices = unpack_indices(rows.view(np.uint8), bits)[:, : taps * groups]  # six-bit codes come in fours
    turned = indices.reshape(n, taps, groups).swapaxes(1, 2).reshape(n, taps * groups)
    return pack_indices(np.ascontiguousarray(turned), bits)


def _padded(size: int) -> int:
    return -(-size // ROW_BYTES) * ROW_BYTES
