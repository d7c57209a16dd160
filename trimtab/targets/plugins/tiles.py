"""How a product with packed weights is cut into programs: by SM, rows and layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from trimtab.errors import UnsupportedOp

SMS = (80, 86, 87, 89, 90, 110, 120, 121)
"""Compute capabilities, as sm_87, that kernels are compiled for."""

SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory that one program may have: CUDA C++ Programming Guide, technical specifications per compute
capability, less the 1 KiB that the system keeps."""

STATIC_LIMIT = 48 * 1024
"""Bytes that a launch may ask for without a call that raises the limit. Nothing in TensorRT's documents says that
it makes that call for kernels which it carries, so those stay below."""

LINE = 128
"""Bytes of the banks of shared memory: as many for each codeword of a table, and no two threads wait for one bank."""

Order = Literal["matrix", "grouped", "taps"]
"""How the codes of a row stand where a weight is decoded: `order`."""


@dataclass(frozen=True)
class FewRows:
    """What one program of cuda/few_rows.cu computes, and with what.

    Attributes:
        rows: Of x, and of y; in eights.
        columns: Of y, which are rows of the weights: 16 or 32.
        stretch: Columns of a row that a thread takes at a time, 16 or 32.
        warps: Of 32 threads, which share the depth: at most, but where it is great; fewer where turns are as many then.
    """

    rows: int
    columns: int = 16
    stretch: int = 16
    warps: int = 12
    source: ClassVar[str] = "few_rows.cu"

    def constants(self, k: int, d: int, bits: int) -> dict[str, int]:
        """What the kernel is compiled with."""
        stretch = 32 if bits == 6 else self.stretch  # whole words of codes
        units = -(-k // (4 * stretch))
        # Each turn is written out, and its codes wait in registers: deep layers get 8 warps at least.
        most = max(self.warps, min(8, -(-units // 8)))
        warps = -(-units // -(-units // most))
        return {"ROWS": self.rows, "COLUMNS": self.columns, "STRETCH": stretch, "WARPS": warps}

    def threads(self, k: int, d: int, bits: int) -> int:
        """Of one program."""
        return 32 * self.constants(k, d, bits)["WARPS"]

    def shared_bytes(self, k: int, d: int, bits: int) -> int:
        """Of one program: the table, and then the sums of its warps."""
        sums = self.constants(k, d, bits)["WARPS"] * self.rows * self.columns * 4
        return max((1 << bits) * LINE, sums)


@dataclass(frozen=True)
class ManyRows:
    """What one program of cuda/many_rows.cu computes, and with what; on sm_90.

    Attributes:
        rows: Of x, and of y: 32, 64 or 128.
        stages: Of the pipeline.
        line: Bytes that the table has for each codeword: `LINE` of them give each bank a copy, fewer leave room.
    """

    rows: int
    stages: int = 3
    line: int = LINE
    columns: ClassVar[int] = 64
    source: ClassVar[str] = "many_rows.cu"

    def constants(self, k: int, d: int, bits: int) -> dict[str, int]:
        """What the kernel is compiled with."""
        return {"ROWS": self.rows, "STAGES": self.stages, "LINE": self.line}

    def threads(self, k: int, d: int, bits: int) -> int:
        """Of one program."""
        return 128

    def shared_bytes(self, k: int, d: int, bits: int) -> int:
        """Of one program: x and the codes on their way, and the table. In the end y lies where x did."""
        codes = 64 * 64 // d * bits // 8
        return self.stages * (self.rows * 128 + codes) + (1 << bits) * self.line


@dataclass(frozen=True)
class Tile:
    """What one program of the Triton kernels computes, and with what.

    Attributes:
        rows: Of x, and of y.
        columns: Of y: rows of the weights.
        depth: Columns of x that one turn of the loop takes.
        warps: Of 32 threads.
        stages: Depth of the software pipeline.
        shared: Codewords are looked up in shared memory; else through L1.
    """

    rows: int
    columns: int
    depth: int = 64
    warps: int = 4
    stages: int = 3
    shared: bool = False


Cut = FewRows | ManyRows | Tile

# Few rows: waiting bounds the time, for the launch and for memory, so each program asks for all that it reads at once,
# and is small, so that they are many. Which cut is best depends on the layer; TensorRT times them. Measured on an H200
# over the layers of DiT-XL/2 and SD 1.5: together within 1% of the best of 13 cuts for one row and of 24 for 16, the
# first alone within 4% and 8%.
_FEW = {
    8: (FewRows(8, 16, 32), FewRows(8, 16, 32, 4), FewRows(8, 32, 32, 4), FewRows(8, warps=4)),
    16: (FewRows(16, warps=4), FewRows(16, 32, warps=4), FewRows(16), FewRows(8, warps=4)),
    64: (FewRows(32, 32, warps=4), FewRows(32, 32)),
}

# On sm_90 from 17 rows on.
_MANY_90 = (ManyRows(64, line=64), ManyRows(32, line=64))

# Many rows elsewhere, mma.sync and tcgen05: 8 warps as 4 x 2 would look up every codeword twice from registers; copying
# codewords asynchronously through L1 into shared memory looks each up once and leaves the threads to the 64
# instructions of a turn. A turn of 128 x 128 x 64 is 1 Mi multiply-adds: 1024 cycles on Orin and A100 and 4096 on
# GeForce, against 64 look-ups of 14 cycles beside them.
_MANY = {256: Tile(64, 64, 64, 4, 4), 1024: Tile(128, 64, 64, 4, 4)}

FEW_ROWS = 64
"""Up to so many are few."""

_SMALL_90 = 360 << 20
"""Multiply-adds of a product of many rows up to which decoding on the way is ahead of decoding first on sm_90."""

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


def fuses(sm: int, rows: int, n: int, k: int) -> bool:
    """Whether a product decodes on the way; else its weight is decoded first, for TensorRT's own product to read.

    Measured on sm_90: the fused kernel is ahead up to 64 rows, and beyond in small products. No other SM was measured.
    There, decoding first adds about 300 / rows to the time of a product on Orin (4 bytes a weight through 205 GB/s,
    beside 2 operations a row at 30 TFLOP/s), and less where the L2 cache holds the weight: beyond 1024 rows, little
    can be lost by it.
    """
    if sm == 90 and rows > FEW_ROWS:
        return rows * n * k <= _SMALL_90 and k % 8 == 0
    return rows <= 1024


def tiles(sm: int, rows: int, k: int) -> tuple[Cut, ...]:
    """The cuts worth trying, the best guess first. One of them fits `STATIC_LIMIT` on every SM.

    Args:
        sm: As in sm_87.
        rows: Of x: batch times tokens.
        k: Input channels; of a product that `fuses` takes.

    Raises:
        UnsupportedOp: No kernel is compiled for this SM.
    """
    if sm not in SMS:
        known = ", ".join(f"sm_{s}" for s in SMS)
        raise UnsupportedOp(
            f"no kernel for sm_{sm}, only for {known}: compile for one of them, or without --vq"
        )
    on_90 = _MANY_90 if sm == 90 and k % 8 == 0 else ()
    for limit, few in _FEW.items():
        if rows <= limit:
            return few if rows <= 16 else (*few, *on_90)
    if on_90:
        return on_90
    chosen, fallback = _MANY[256 if rows <= 256 else 1024], _MANY[256]
    return (chosen,) if chosen == fallback else (chosen, fallback)
