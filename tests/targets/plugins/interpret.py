"""Runs the kernels in Triton's interpreter, on the CPU, against a plain loop; prints one JSON object.

Has a process of its own, started with TRITON_INTERPRET=1: Triton reads that when it is imported.
"""

from __future__ import annotations

import json
import math

import numpy as np
import torch
import triton.language as tl

from trimtab.targets.plugins.codes import as_words, grouped
from trimtab.targets.plugins.kernels import constants, vq_decode, vq_matmul
from trimtab.targets.plugins.tiles import DECODE, Tile, order


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n, j) codes as (n, bytes) packed rows, bit by bit: bit b of code c is bit c * bits + b of its row."""
    rows = np.zeros((len(codes), -(-codes.shape[1] // 4) * 4 * bits // 8), np.uint8)
    for n, row in enumerate(codes):
        for c, code in enumerate(row):
            for b in range(bits):
                bit = c * bits + b
                rows[n, bit // 8] |= (int(code) >> b & 1) << bit % 8
    return rows


def weights(codes: np.ndarray, codebook: torch.Tensor, k: int) -> torch.Tensor:
    """W (n, k), one codeword after the other."""
    out = torch.zeros((len(codes), k), dtype=codebook.dtype)
    for n, row in enumerate(codes):
        for c, code in enumerate(row):
            for e, value in enumerate(codebook[code]):
                if c * codebook.shape[1] + e < k:
                    out[n, c * codebook.shape[1] + e] = value
    return out


def _integers(codebook: torch.Tensor) -> torch.Tensor:
    """A codebook (k, d) of a 16-bit type as one integer a codeword, as the kernels read it."""
    return codebook.contiguous().view({2: torch.int32, 4: torch.int64}[codebook.shape[1]]).reshape(-1)


def _programs(tile: Tile, rows: int, columns: int) -> int:
    """How many programs cover a result of this size."""
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def launch_matmul(
    x: torch.Tensor,
    words: torch.Tensor,
    codebook: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    tile: Tile,
    bits: int = 8,
) -> torch.Tensor:
    """Runs `vq_matmul`.

    Args:
        x: (m, k) fp16 or bf16.
        words: (n, stride) int32.
        codebook: (256 or 64, d) of the type of x.
        scale: (n) fp32.
        bias: (n) of the type of x.
        tile: How the work is cut.
        bits: A code's, 8 or 6.
    """
    (m, k), n = x.shape, words.shape[0]
    y = x.new_empty((m, n))
    vq_matmul[(_programs(tile, m, n),)](
        x, words, _integers(codebook), scale, bias, m, n, k, words.shape[1], y,
        **constants(tile, k % tile.depth == 0, codebook.shape[1], bits), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def launch_decode(
    words: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor, shape: tuple[int, ...], bits: int = 8
) -> torch.Tensor:
    """Runs `vq_decode`.

    Args:
        words: (n, stride) int32, the codes in the `order` of the shape.
        codebook: (256 or 64, d) fp16 or bf16.
        scale: (n) fp32.
        shape: Of W, (n, channels, taps...).
        bits: A code's, 8 or 6.
    """
    d = codebook.shape[1]
    n, taps = shape[0], math.prod(shape[2:])
    arranged = order(shape, d)
    tile = DECODE[arranged]
    y = codebook.new_empty(shape)
    vq_decode[(_programs(tile, shape[1] * taps, n),)](
        words, _integers(codebook), scale, n, shape[1] * taps, words.shape[1], taps, y,
        D=d, BITS=bits, ORDER=arranged, SHARED=tile.shared, BLOCK_N=tile.columns, BLOCK_K=tile.rows,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def case(
    m: int, n: int, k: int, tile: Tile, d: int = 4, bits: int = 8, dtype: torch.dtype = torch.float16
) -> float:
    """The largest error of the product, relative to its largest value."""
    random = np.random.default_rng(m * n * k)
    codes = random.integers(0, 1 << bits, (n, -(-k // d)), dtype=np.uint8)
    codebook = torch.from_numpy(random.standard_normal((1 << bits, d))).to(dtype)
    x = torch.from_numpy(random.standard_normal((m, k))).to(dtype)
    scale = torch.from_numpy(random.uniform(0.5, 2, n).astype(np.float32))
    bias = torch.from_numpy(random.standard_normal(n)).to(dtype)
    words = torch.from_numpy(as_words(pack(codes, bits)))
    y = launch_matmul(x, words, codebook, scale, bias, tile, bits).float()
    w = weights(codes, codebook, k).double()
    expected = (x.double() @ w.T) * scale.double() + bias.double()
    return float((y - expected).abs().max() / expected.abs().max())


def decoded(shape: tuple[int, ...], d: int, bits: int, scaled: bool) -> int:
    """How many decoded weights differ from the plain loop's."""
    random = np.random.default_rng(sum(shape))
    n, channels, taps = shape[0], shape[1], int(np.prod(shape[2:]))
    codes = random.integers(0, 1 << bits, (n, -(-channels * taps // d)), dtype=np.uint8)
    codebook = torch.from_numpy(random.standard_normal((1 << bits, d))).to(torch.float16)
    scale = torch.from_numpy(random.uniform(0.5, 2, n).astype(np.float32)) if scaled else torch.ones(n)
    rows = pack(codes, bits)
    if order(shape, d) == "grouped":
        rows = grouped(rows, shape, d, bits)
    got = launch_decode(torch.from_numpy(as_words(rows)), codebook, scale, shape, bits)
    plain = (weights(codes, codebook, channels * taps).float() * scale[:, None]).half()
    return int((got != plain.reshape(n, taps, channels).mT.reshape(shape)).sum())


def understand_bfloat16() -> None:
    """Triton's interpreter keeps bfloat16 as uint16 and multiplies those integers; hardware multiplies numbers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    plain = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: plain(self, numbers(a), numbers(b), *rest)


MANY = Tile(32, 32, 32)

if __name__ == "__main__":
    understand_bfloat16()
    results = {
        "a product": case(40, 48, 64, MANY),
        "odd sizes": case(33, 35, 51, MANY),
        "two weights a codeword": case(32, 32, 64, MANY, d=2),
        "six bits": case(32, 33, 67, MANY, d=2, bits=6),
        "bfloat16": case(32, 32, 64, MANY, dtype=torch.bfloat16),
        "decode 3x3": decoded((18, 8, 3, 3), 4, 8, False),
        "decode 3x3, six bits": decoded((3, 12, 3, 3), 2, 6, True),
        "decode 1x3, six bits": decoded((9, 10, 1, 3), 2, 6, False),
        "decode a matrix of more than a program": decoded((20, 300), 4, 8, True),
        "decode a row of more than a program": decoded((3, 152, 3, 3), 4, 8, False),
        "decode 1x1 of odd channels": decoded((5, 21, 1, 1), 4, 8, False),
        "decode 3x3 of odd channels, six bits": decoded((3, 5, 3, 3), 2, 6, False),
        "decode with scales": decoded((16, 12, 3, 3), 2, 8, True),
    }
    print(json.dumps(results))
