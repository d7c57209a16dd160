"""Claim: products with 2-bit weights keep up with cuBLAS in FP16, and leave it behind where rows are few.

    python benchmarks/vq_kernels.py [--quick] [--json]

On an NVIDIA GPU, over the layer shapes of DiT-XL/2 and Stable Diffusion 1.5 and 1, 16, 256, 1024 and 4096 rows:
the fused kernel against `torch.nn.functional.linear` on the decoded weights (cuBLAS), and against decoding first and
multiplying then. The goals are 2 times cuBLAS's speed up to 16 rows, 0.8 times from 256 on, and always ahead of
decode-then-multiply. Convolutions are timed as decode-then-convolve against the dense convolution.

Each time is the mean over a CUDA graph of launches that go round copies of the weights, packed or not, of at least
twice the L2 cache: in a network, a layer's weights have left the cache when its turn comes again. The table's tile
(trimtab/targets/plugins/tiles.py) is timed, then all candidates (not with --quick), and the best ones are printed as
that file would have them. What is computed is compared on every shape. Takes up to 6 minutes on an H100, most
of it compiling. Without a GPU it says so and stops.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.errors import MissingDependency, UnsupportedOp
from trimtab.targets.plugins.codes import as_words
from trimtab.targets.plugins.tiles import DECODE, SHARED_LIMIT, Tile, tiles

ROWS = (1, 16, 256, 1024, 4096)
LINEARS = {
    "DiT q, k, v, out": (1152, 1152),
    "DiT fused qkv": (3456, 1152),
    "DiT mlp in": (4608, 1152),
    "DiT mlp out": (1152, 4608),
    "DiT adaLN": (6912, 1152),
    "SD 320": (320, 320),
    "SD 640": (640, 640),
    "SD 1280": (1280, 1280),
    "SD text to 1280": (1280, 768),
    "SD geglu 1280": (10240, 1280),
    "SD mlp out 1280": (1280, 5120),
}
"""Output and input channels. A 1x1 convolution is the product of its channels."""

CONVOLUTIONS = {
    "SD 3x3 320": ((320, 320, 3, 3), 64),
    "SD 3x3 640": ((640, 640, 3, 3), 32),
    "SD 3x3 1280": ((1280, 1280, 3, 3), 16),
    "SD 3x3 2560": ((1280, 2560, 3, 3), 16),
}
"""Weight and height of the latents; two rows of guidance."""


@dataclass(frozen=True)
class Line:
    """One line of the table. Times are of one call, in microseconds.

    Attributes:
        layer: Its name.
        rows: Of the left side.
        dense_us: cuBLAS on decoded weights.
        fused_us: The kernel with the table's tile.
        best_us: With the best candidate.
        decoded_us: Decode, then cuBLAS.
        error: Largest difference from cuBLAS, by the largest value.
        tile: The best candidate.
    """

    layer: str
    rows: int
    dense_us: float
    fused_us: float
    best_us: float
    decoded_us: float
    error: float
    tile: Tile

    @property
    def goal(self) -> float:
        """The least ratio to cuBLAS's speed."""
        return 2.0 if self.rows <= 16 else 0.8

    @property
    def ratio(self) -> float:
        """cuBLAS's time by the table's tile's."""
        return self.dense_us / self.fused_us

    @property
    def met(self) -> bool:
        """Whether the table's tile meets both goals."""
        return self.ratio >= self.goal and self.fused_us < self.decoded_us


def candidates(sm: int, rows: int) -> Iterable[Tile]:
    """Tiles worth compiling: both ways to look up, and what the registers of the accumulators allow."""
    if rows <= 16:
        height = 8 if rows <= 8 else 16
        for columns, depth, split, warps in [(16, 64, 8, 8), (16, 64, 4, 4), (16, 128, 4, 4), (32, 64, 4, 4)]:
            yield Tile(height, columns, depth, split, warps, 3, True, True)
        yield Tile(height, 16, 64, 8, 8, 4)
        yield Tile(height, 16, 128, 8, 8, 2, True, True)
        return
    sizes = [(64, 64, 4), (128, 64, 4), (128, 128, 8)]
    if rows > 256:
        sizes += [(256, 64, 8), (256, 128, 8)] if sm in (90, 110) else [(64, 128, 4)]
    for height, width, warps in sizes:
        for depth in (32, 64):
            yield Tile(height, width, depth, 1, warps, 4)
        if sm in (90, 110):
            yield Tile(height, width, 64, 1, warps, 3, True, True)


def clock(work: list[Callable[[], Any]], repeats: int = 7) -> float:
    """Microseconds of one call, from a CUDA graph of all of them."""
    import torch

    for call in work[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in work:
            call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(work))
    return statistics.median(times[1:])


class Layer:
    """A packed weight and what it decodes to, in as many copies as keep both out of the cache."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        import torch

        from trimtab.targets.plugins.kernels import launch_decode

        random = np.random.default_rng(0)
        n, k = shape[0], math.prod(shape[1:])
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        rows = as_words(random.integers(0, 256, (n, k // 4), dtype=np.uint8))
        copies = min(max(2 * cache // rows.nbytes, 2), 400)
        self.words = [torch.from_numpy(rows).cuda() for _ in range(copies)]
        self.codebook = torch.from_numpy(random.standard_normal((256, 4)) / math.sqrt(k)).half().cuda()
        self.scale = torch.ones(n, device="cuda")
        self.bias = torch.from_numpy(random.standard_normal(n)).half().cuda()
        weight = launch_decode(self.words[0], self.codebook, self.scale, shape, DECODE)
        self.dense = [weight.clone() for _ in range(min(max(2 * cache // (2 * n * k), 2), 400))]
        self.shape = shape

    def decoded(self, index: int) -> Any:
        """The weights, by the kernel that decodes them."""
        from trimtab.targets.plugins.kernels import launch_decode

        return launch_decode(self.words[index], self.codebook, self.scale, self.shape, DECODE)


def linear(name: str, layer: Layer, rows: int, sm: int, quick: bool) -> Line:
    """Times one product."""
    import torch
    from torch.nn.functional import linear as dense

    from trimtab.targets.plugins.kernels import launch_matmul

    x = torch.randn(rows, layer.shape[1], device="cuda", dtype=torch.float16)
    y = torch.empty(rows, layer.shape[0], device="cuda", dtype=torch.float16)
    packed = range(min(len(layer.words), 100))

    def fused(tile: Tile) -> float:
        def call(words: Any) -> Callable[[], Any]:
            return lambda: launch_matmul(x, words, layer.codebook, layer.scale, layer.bias, tile, out=y)

        return clock([call(layer.words[i]) for i in packed])

    def multiply(weight: Any) -> Callable[[], Any]:
        return lambda: dense(x, weight, layer.bias)

    first = tiles(sm, rows)[0]
    expected = dense(x, layer.dense[0], layer.bias).float()
    launch_matmul(x, layer.words[0], layer.codebook, layer.scale, layer.bias, first, out=y)
    error = float((y.float() - expected).abs().max() / expected.abs().max())
    table = fused(first)
    timed = {first: table}
    for tile in [] if quick else candidates(sm, rows):
        if tile not in timed:
            try:
                timed[tile] = fused(tile)
            except (
                Exception
            ) as failure:  # a candidate may ask for more than the SM has; Triton has many errors for it
                print(f"{tile} on {name}: {str(failure).splitlines()[0]}", file=sys.stderr)
    best = min(timed, key=timed.__getitem__)
    return Line(
        layer=name,
        rows=rows,
        dense_us=clock([multiply(weight) for weight in layer.dense[:100]]),
        fused_us=table,
        best_us=timed[best],
        decoded_us=clock([lambda i=i: dense(x, layer.decoded(i), layer.bias) for i in packed]),  # type: ignore[misc]
        error=error,
        tile=best,
    )


def convolution(name: str, layer: Layer, size: int) -> dict[str, Any]:
    """Times one convolution, dense and decoded first."""
    import torch
    from torch.nn.functional import conv2d

    x = torch.randn(2, layer.shape[1], size, size, device="cuda", dtype=torch.float16)
    dense = clock([lambda w=w: conv2d(x, w, layer.bias, padding=1) for w in layer.dense[:50]])  # type: ignore[misc]
    packed = range(min(len(layer.words), 50))
    decode = clock([lambda i=i: layer.decoded(i) for i in packed])  # type: ignore[misc]
    both = clock([lambda i=i: conv2d(x, layer.decoded(i), layer.bias, padding=1) for i in packed])  # type: ignore[misc]
    return {"layer": name, "dense_us": dense, "decode_us": decode, "both_us": both, "ratio": dense / both}


def measure(quick: bool) -> dict[str, Any]:
    """All lines, as plain data.

    Raises:
        UnsupportedOp: There is no GPU, or one without kernels.
        MissingDependency: There is no torch or no Triton.
    """
    try:
        import torch
        import triton
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "triton", "kernels") from error
    if not torch.cuda.is_available():
        raise UnsupportedOp("no CUDA GPU was found: run it on a machine with one")
    sm = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    tiles(sm, 1)
    lines = []
    for name, shape in LINEARS.items():
        layer = Layer(shape)
        lines += [linear(name, layer, rows, sm, quick) for rows in ROWS]
    return {
        "device": torch.cuda.get_device_name(),
        "sm": sm,
        "shared_kib": SHARED_LIMIT[sm],
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
        "lines": [{**vars(line), "ratio": line.ratio, "met": line.met} for line in lines],
        "convolutions": [convolution(n, Layer(shape), size) for n, (shape, size) in CONVOLUTIONS.items()],
    }


def show(result: dict[str, Any]) -> None:
    """The tables, and the best tile of every number of rows by the sum of its times."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"{result['device']}, sm_{result['sm']}, {versions}\n")
    print(
        f"{'layer':18} {'rows':>5} {'cuBLAS':>8} {'fused':>8} {'ratio':>6} {'best':>8} {'decode+':>8} {'error':>8}"
    )
    for line in result["lines"]:
        print(
            f"{line['layer']:18} {line['rows']:5} {line['dense_us']:8.2f} {line['fused_us']:8.2f} {line['ratio']:6.2f} "
            f"{line['best_us']:8.2f} {line['decoded_us']:8.2f} {line['error']:8.1e} {'' if line['met'] else 'short'}"
        )
    met = sum(line["met"] for line in result["lines"])
    print(f"\n{met} of {len(result['lines'])} meet both goals (times in microseconds)\n")
    for rows in ROWS:
        votes: dict[Tile, float] = {}
        for line in result["lines"]:
            if line["rows"] == rows:
                gain = math.log(line["fused_us"] / line["best_us"])
                votes[line["tile"]] = votes.get(line["tile"], 0.0) + gain
        print(f"{rows:5} rows, best of most gain: {max(votes, key=votes.__getitem__)}")
    print()
    for line in result["convolutions"]:
        print(
            f"{line['layer']:18} dense {line['dense_us']:8.2f}  decode {line['decode_us']:8.2f}  "
            f"both {line['both_us']:8.2f}  ratio {line['ratio']:.2f}"
        )


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="the table's tiles only")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        result = measure(arguments.quick)
    except (UnsupportedOp, MissingDependency) as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 0
    if arguments.json:
        print(json.dumps(result, default=vars))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
