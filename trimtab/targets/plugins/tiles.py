"""How a product with packed weights is cut into programs: by SM and by the number of rows."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import UnsupportedOp

SMS = (80, 86, 87, 89, 90, 110, 120, 121)
"""Compute capabilities, as sm_87, that kernels are compiled for."""

SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 110: 227, 120: 99, 121: 99}
"""KiB of shared memory that one program may have: CUDA C++ Programming Guide, technical specifications per compute
capability, less the 1 KiB that the system keeps."""

STATIC_LIMIT = 48 * 1024
"""Bytes that a launch may ask for without a call that raises the limit. Nothing in TensorRT's documents says that
it makes that call for kernels which it carries, so those stay below."""


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


# Few rows: the codes' way from memory bounds the time, then the look-ups. A lookup in shared memory serves 32
# threads in about 6 cycles (two halves of 16 threads, each as slow as the fullest of 16 bank pairs: 3.1 expected);
# through L1 it takes one cycle per cache line, 14 of the codebook's 16. A tile of 16 columns is the smallest that
# the instruction has, for as many programs as there can be; eight warps on eight parts keep the loads in flight.
_FEW = Tile(8, 16, 64, 8, 8, 3, True, True)
_SIXTEEN = Tile(16, 16, 64, 8, 8, 3, True, True)
_DOZENS = Tile(32, 32, 64, 4, 8, 3, True, True)

# Many rows, mma.sync (sm_80 to 89, 120, 121): 8 warps as 4 x 2 would look up every codeword twice from registers;
# copying codewords asynchronously through L1 into shared memory looks each up once and leaves the threads to the
# 64 instructions of a turn. A turn of 128 x 128 x 64 is 1 Mi multiply-adds: 1024 cycles on Orin and A100 and 4096
# on GeForce, against 64 look-ups of 14 cycles beside them.
_SYNC = {
    256: Tile(64, 64, 64, 1, 4, 4),
    1024: Tile(128, 64, 64, 1, 4, 4),
    0: Tile(128, 128, 32, 1, 8, 4),
}

# Many rows, wgmma (sm_90) and tcgen05 (sm_110): a turn takes 512 and 256 cycles, so look-ups bound it: shared
# memory, 64 of 6 cycles, with the left operand straight in registers and as many rows as the accumulators allow.
_ASYNC = {
    256: Tile(64, 64, 64, 1, 4, 3, True, True),
    1024: Tile(128, 128, 64, 1, 8, 3, True, True),
    0: Tile(256, 128, 64, 1, 8, 3, True, True),
}

DECODE = Tile(256, 16, warps=4, stages=1)
"""For `vq_decode`: a program writes 16 rows of 256 weights."""


def tiles(sm: int, rows: int) -> tuple[Tile, ...]:
    """The tiles worth trying, the best guess first. The last one fits `STATIC_LIMIT` on every SM.

    Args:
        sm: As in sm_87.
        rows: Of x: batch times tokens.

    Raises:
        UnsupportedOp: No kernel is compiled for this SM.
    """
    if sm not in SMS:
        known = ", ".join(f"sm_{s}" for s in SMS)
        raise UnsupportedOp(
            f"no kernel for sm_{sm}, only for {known}: compile for one of them, or without --vq"
        )
    if rows <= 8:
        return (_FEW,)
    if rows <= 16:
        return (_SIXTEEN,)
    if rows <= 64:
        return (_DOZENS,)
    table = _ASYNC if sm in (90, 110) else _SYNC
    chosen = next(tile for limit, tile in table.items() if not limit or rows <= limit)
    fallback = _SYNC[256]
    return (chosen,) if chosen == fallback else (chosen, fallback)
