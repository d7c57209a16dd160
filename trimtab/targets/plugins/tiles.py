"""How a product with packed weights is cut into programs: by SM and by the number of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trimtab.errors import UnsupportedOp

SMS = (80, 86, 87, 89, 90, 110, 120, 121)
"""Compute capabilities, as sm_87, that kernels are compiled for."""

SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory that one program may have: CUDA C++ Programming Guide, technical specifications per compute
capability, less the 1 KiB that the system keeps."""

STATIC_LIMIT = 48 * 1024
"""Bytes that a launch may ask for without a call that raises the limit. Nothing in TensorRT's documents says that
it makes that call for kernels which it carries, so those stay below."""


Order = Literal["matrix", "grouped", "taps"]
"""How the codes of a row stand where a weight is decoded: `order`."""


@dataclass(frozen=True)
class Tile:
    """What one program computes, and with what.

    Attributes:
        rows: Of x, and of y.
        columns: Of y: rows of the weights.
        depth: Columns of x that one turn of the loop takes.
        split: Parts that share the depth of the product between them.
        warps: Of 32 threads.
        stages: Depth of the software pipeline.
        shared: Codewords are looked up in shared memory; else through L1.
        permuted: The operands' columns are ordered by codeword (`kernels._permuted`).
    """

    rows: int
    columns: int
    depth: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 3
    shared: bool = False
    permuted: bool = False

    def programs(self, rows: int, columns: int) -> int:
        """How many programs cover a result of this size."""
        return -(-rows // self.rows) * -(-columns // self.columns)


# Few rows: waiting bounds the time, for the launch, for memory and for look-ups, so programs are small and many, and
# parts of one split the depth between them. A lookup in shared memory serves 32 threads in about 6 cycles (two halves
# of 16 threads, each as slow as the fullest of 16 bank pairs: 3.1 expected); through L1 it takes one cycle per cache
# line, 14 of the codebook's 16. Which of three cuts is best depends on the layer; TensorRT times them. Measured on an
# H100: together within 2% of the best of 42 for the layers of DiT-XL/2 and SD 1.5 (8% from 17 rows on), the first
# alone within 10% up to 16 rows.
_FEW = {
    8: (
        Tile(8, 16, 128, 4, 4, 3, True, True),
        Tile(8, 16, 128, 8, 4, 3, True, True),
        Tile(8, 32, 128, 2, 4, 3, True, True),
    ),
    16: (
        Tile(16, 16, 128, 4, 4, 3, True, True),
        Tile(16, 16, 64, 4, 4, 4, True, True),
        Tile(16, 32, 128, 2, 4, 3, True, True),
    ),
    64: (Tile(32, 64, 128, 1, 4, 3, True, True), Tile(16, 16, 128, 2, 2, 3, True, True)),
}

# Many rows, mma.sync (sm_80 to 89, 120, 121): 8 warps as 4 x 2 would look up every codeword twice from registers;
# copying codewords asynchronously through L1 into shared memory looks each up once and leaves the threads to the
# 64 instructions of a turn. A turn of 128 x 128 x 64 is 1 Mi multiply-adds: 1024 cycles on Orin and A100 and 4096
# on GeForce, against 64 look-ups of 14 cycles beside them.
_SYNC = {256: Tile(64, 64, 64, 1, 4, 4), 1024: Tile(128, 64, 64, 1, 4, 4)}

# Many rows, wgmma and tcgen05 (sm_90, sm_110): a turn takes 512 and 256 cycles, so look-ups bound it: shared memory,
# 64 of 6 cycles, with the left operand straight in registers.
_ASYNC = {256: Tile(64, 64, 64, 1, 4, 3, True, True), 1024: Tile(128, 128, 64, 1, 8, 3, True, True)}

_FUSED_ROWS = {90: 64}
_FUSED_ROWS_ELSEWHERE = 1024

DECODE: Mapping[Order, Tile] = {
    "matrix": Tile(256, 16, warps=4, stages=1, shared=True),
    "grouped": Tile(1024, 2, warps=4, stages=1),
    "taps": Tile(256, 16, warps=4, stages=1),
}
"""For `vq_decode`, by the order of the codes: a program writes so many columns of rows of weights."""


def order(shape: Sequence[int], d: int) -> Order:
    """How the decoder takes the codes of a weight.

    Args:
        shape: (n, channels, taps...).
        d: Weights of one codeword.

    Returns:
        "matrix" where there is one tap; else "grouped", for rows as `codes.grouped` gives them, where no codeword lies
        across two taps; else "taps": all channels of one tap after the other, as the graph has them.
    """
    if math.prod(shape[2:]) == 1:
        return "matrix"
    return "taps" if shape[1] % d else "grouped"


def fuses(sm: int, rows: int) -> bool:
    """Whether a product decodes on the way; else its weight is decoded first, for TensorRT's own product to read.

    On an H100, the fused kernel is ahead up to 64 rows, behind from 128 on, and takes twice the time of
    decode-then-multiply at 1024. No other GPU was measured. There, decoding first adds about 300 / rows to the time of
    a product on Orin (4 bytes a weight through 205 GB/s, beside 2 operations a row at 30 TFLOP/s), and less where the
    L2 cache holds the weight: beyond 1024 rows, little can be lost by it.
    """
    return rows <= _FUSED_ROWS.get(sm, _FUSED_ROWS_ELSEWHERE)


def tiles(sm: int, rows: int) -> tuple[Tile, ...]:
    """The tiles worth trying, the best guess first. One of them fits `STATIC_LIMIT` on every SM.

    Args:
        sm: As in sm_87.
        rows: Of x: batch times tokens; as many as `fuses` takes.

    Raises:
        UnsupportedOp: No kernel is compiled for this SM.
    """
    if sm not in SMS:
        known = ", ".join(f"sm_{s}" for s in SMS)
        raise UnsupportedOp(
            f"no kernel for sm_{sm}, only for {known}: compile for one of them, or without --vq"
        )
    for limit, few in _FEW.items():
        if rows <= limit:
            return few
    table = _ASYNC if sm in (90, 110) else _SYNC
    chosen = table[256 if rows <= 256 else 1024]
    fallback = _SYNC[256]
    return (chosen,) if chosen == fallback else (chosen, fallback)
