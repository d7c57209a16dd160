"""The Triton kernels for weights that are held as codes into a codebook: the decoder, and products of many rows.

Products of few rows, and of many on sm_90, are in cuda/. docs/kernels.md says why they look so.

Shapes: ``x`` (m, k), ``y`` (m, n), both fp16 or bf16 and contiguous. ``words`` (n, stride) int32: the rows of packed
codes, each padded to whole words. ``codebook`` (256 or 64, d) of the type of ``x``, seen as one integer a codeword:
int64 for d = 4, int32 for d = 2. ``scale`` (n) fp32, ``bias`` (n) of the type of ``x``. Scalars stand between the
inputs and the output because that is the order in which TensorRT passes arguments to a compiled kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trimtab.targets.plugins.tiles import Tile


@triton.jit
def _words(words, row, column, stride, EVEN: tl.constexpr):
    """(rows, columns) words; past the end of a row, zeros."""
    if EVEN:
        return tl.load(words + row[:, None] * stride + column)
    else:
        return tl.load(words + row[:, None] * stride + column, mask=column < stride, other=0)


@triton.jit
def _codes(words, row, first, stride, EVEN: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):
    """(rows, COUNT) codes, from code ``first`` of each row on, a multiple of 16 as COUNT is.

    Codes come as whole words, so that the copy of words can run ahead asynchronously, which the hardware does for
    four bytes and more: a word is four codes of eight bits, and three words are sixteen of six.
    """
    if BITS == 8:
        column = first[:, None] // 4 + tl.arange(0, COUNT // 4)[None, :]
        word = _words(words, row, column, stride, EVEN)
        code = (word[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]) & 255
    else:
        column = (first[:, None] // 16 + tl.arange(0, COUNT // 16)[None, :]) * 3
        low = _words(words, row, column, stride, EVEN).to(tl.uint32, bitcast=True).to(tl.uint64)
        middle = _words(words, row, column + 1, stride, EVEN).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = _words(words, row, column + 2, stride, EVEN).to(tl.uint32, bitcast=True).to(tl.uint64)
        index = tl.arange(0, 16)[None, None, :]
        # The first ten lie in the lower two words, the others in the upper two.
        lower = (low | (middle << 32))[:, :, None] >> (6 * tl.minimum(index, 9)).to(tl.uint64)
        upper = (middle | (high << 32))[:, :, None] >> (6 * tl.maximum(index, 10) - 32).to(tl.uint64)
        code = tl.where(index < 10, lower, upper).to(tl.int32) & 63
    return tl.reshape(code, (row.shape[0], COUNT))


@triton.jit
def _weights(words, codebook, row, first, stride, EVEN: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
             SHARED: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """(rows, DEPTH) decoded weights from code ``first`` on."""
    if SHARED:  # asked for before the codes are, which all of it waits for
        table = tl.load(codebook + tl.arange(0, 256 if BITS == 8 else 64))
    code = _codes(words, row, first, stride, EVEN, BITS, DEPTH // D)
    if SHARED:
        flat = tl.gather(table, tl.reshape(code, (row.shape[0] * (DEPTH // D),)), 0)
        word = tl.reshape(flat, (row.shape[0], DEPTH // D))
    else:
        word = tl.load(codebook + code)
    w0 = word.to(tl.int16).to(DTYPE, bitcast=True)
    w1 = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    if D == 2:
        w = tl.join(w0, w1)
    else:
        w2 = (word >> 32).to(tl.int16).to(DTYPE, bitcast=True)
        w3 = (word >> 48).to(tl.int16).to(DTYPE, bitcast=True)
        w = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(w, (row.shape[0], DEPTH))


@triton.jit
def vq_matmul(x, words, codebook, scale, bias, m, n, k, stride, y, D: tl.constexpr, BITS: tl.constexpr,
              EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """y = (x W^T) scale + bias, with W decoded on the way; fp32 accumulators.

    The weights are the left operand (rows of W are rows of the instruction), since the left one may come from
    registers.
    """
    program = tl.program_id(0)
    blocks_n = tl.cdiv(n, BLOCK_N)
    # Neighbouring programs share rows of x: those then come from memory once, and codes are small enough for L2.
    out_n = (program % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    out_m = (program // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the end are read again from the last one and never stored: cheaper than a mask.
    row_n = tl.minimum(out_n, n - 1)
    row_m = tl.minimum(out_m, m - 1)
    column = tl.arange(0, BLOCK_K)
    x_at = x + row_m[:, None] * k + column[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for at in range(0, k, BLOCK_K):
        if EVEN:
            rows = tl.load(x_at + at)
        else:
            rows = tl.load(x_at + at, mask=(column < k - at)[None, :], other=0.0)
        weights = _weights(words, codebook, row_n, (tl.zeros_like(row_n) + at) // D, stride, EVEN, BITS, D, False,
                           BLOCK_K, x.dtype.element_ty)  # fmt: skip
        total = tl.dot(weights, tl.trans(rows), total)
    by = tl.load(scale + row_n)
    plus = tl.load(bias + row_n).to(tl.float32)
    total = total * by[:, None] + plus[:, None]
    inside = (out_m[None, :] < m) & (out_n[:, None] < n)
    tl.store(y + out_m[None, :] * n + out_n[:, None], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def vq_decode(words, codebook, scale, n, k, stride, taps, y, D: tl.constexpr, BITS: tl.constexpr,
              ORDER: tl.constexpr, SHARED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """W of a product (n, k) or of a convolution (n, k / taps, taps), from codes in the order that `tiles.order` names.

    Exact where every scale is 1; else each weight is rounded once, after the product in fp32.
    """
    blocks_n = tl.cdiv(n, BLOCK_N)
    out_n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = (tl.program_id(0) // blocks_n) * BLOCK_K
    row = tl.minimum(out_n, n - 1)
    dtype: tl.constexpr = y.dtype.element_ty
    weights = _weights(words, codebook, row, (tl.zeros_like(row) + start) // D, stride, False, BITS, D, SHARED,
                       BLOCK_K, dtype)  # fmt: skip
    by = tl.load(scale + row)
    weights = (weights.to(tl.float32) * by[:, None]).to(dtype)
    column = start + tl.arange(0, BLOCK_K)
    if ORDER == "matrix":
        place = column
    elif ORDER == "grouped":
        # Weights that are written here lie within taps * D of each other: lines of memory are filled by one program.
        code = column // D
        place = (code // taps) * (taps * D) + (column % D) * taps + code % taps
    else:
        channels = k // taps
        place = (column % channels) * taps + column // channels
    inside = (out_n[:, None] < n) & (column[None, :] < k)
    tl.store(y + out_n[:, None] * k + place[None, :], weights, mask=inside)


def constants(tile: Tile, even: bool, d: int, bits: int) -> dict[str, int | bool]:
    """The compile-time arguments of `vq_matmul` for one tile; ``even``: its depth divides the rows of the weights."""
    return {
        "D": d,
        "BITS": bits,
        "EVEN": even,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
    }
