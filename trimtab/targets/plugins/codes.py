"""Packed codes as the kernels and TensorRT take them: rows of 32-bit words."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ROW_BYTES = 16
"""Rows start at a multiple of it: the widest load that a thread has."""


def as_words(rows: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Rows of packed codes, each padded with zeros to whole 16 bytes, as words; the bytes stay in their order.

    TensorRT has no constants of UINT8, and INT8 ones only before a DequantizeLinear; INT32 may be anything.

    Args:
        rows: (n, bytes) uint8: the codes of one output channel a row, eight bits each, or four of six bits in
            three bytes, the first code in the lowest bits.

    Returns:
        (n, words) int32, little-endian.
    """
    padded = np.zeros((rows.shape[0], -(-rows.shape[1] // ROW_BYTES) * ROW_BYTES), np.uint8)
    padded[:, : rows.shape[1]] = rows
    return padded.view("<i4").astype(np.int32, copy=False)
