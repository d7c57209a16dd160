"""Products with 2-bit weights against cuBLAS in FP16: goals are set, and what meets them is said (docs/kernels.md).

    python benchmarks/vq_kernels.py [--tune] [--rows N ...] [--kernels FILE] [--json]
    python benchmarks/vq_kernels.py --compile FILE --sm 90 [--tune] [--rows N ...]

On an NVIDIA GPU, over the layer shapes of DiT-XL/2 and Stable Diffusion 1.5 and 1, 16, 256, 1024 and 4096 rows: the
kernels as they ship, compiled ahead of time, loaded by the driver, the best of those that TensorRT may choose from,
against `torch.nn.functional.linear` on the decoded weights (cuBLAS). "packed" is what trimtab lowers to: the fused
kernel, or the decoder with cuBLAS after it. The goals are 2 times cuBLAS's speed up to 16 rows, 0.8 times from 256 on,
and never behind decode-then-multiply. Convolutions are decoded and then computed by cuDNN, against cuDNN on the decoded
weights.

Each time is the mean over a CUDA graph of launches that go round copies of the weights and codebooks, packed or not, of
at least twice the L2 cache: in a network, a layer's weights have left the cache when its turn comes again. What is
computed is compared on every shape. --tune adds other cuts, also those that need more shared memory than TensorRT is
known to give, and prints the best ones as trimtab/targets/plugins/tiles.py would have them. Kernels may be compiled
elsewhere, with --compile: a machine without the compilers reads them with --kernels. Without a GPU it says so and
stops.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import MissingDependency, UnsupportedOp
from trimtab.targets.plugins.aot import Kernel, decode_kernel, matmul_kernels, read_kernels
from trimtab.targets.plugins.codes import row_words
from trimtab.targets.plugins.tiles import (
    FEW_ROWS,
    SHARED_LIMIT,
    STATIC_LIMIT,
    Cut,
    FewRows,
    ManyRows,
    Tile,
    fuses,
    order,
    tiles,
)

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
class Candidate:
    """A kernel of the benchmark.

    Attributes:
        tile: The cut, as tiles.py would have it; "" of a decoder.
        ships: Whether it is one that TensorRT may choose.
        kernel: It.
    """

    tile: str
    ships: bool
    kernel: Kernel


Book = Mapping[str, Sequence[Candidate]]
"""`product_key` or `decoder_key` -> kernels."""


@dataclass(frozen=True)
class Line:
    """One line of the table. Times are of one call, in microseconds.

    Attributes:
        layer: Its name.
        rows: Of the left side.
        dense_us: cuBLAS on decoded weights.
        fused_us: The best of the fused kernels that ship.
        decoded_us: Decode, then cuBLAS.
        fused: Whether trimtab lowers to the fused kernel.
        error: Largest difference of a fused kernel from cuBLAS, by the largest value.
        tiles: Cut -> time of the fused kernel.
    """

    layer: str
    rows: int
    dense_us: float
    fused_us: float
    decoded_us: float
    fused: bool
    error: float
    tiles: Mapping[str, float]

    @property
    def packed_us(self) -> float:
        """Of what trimtab lowers to."""
        return self.fused_us if self.fused else self.decoded_us

    @property
    def goal(self) -> float:
        """The least ratio to cuBLAS's speed; none is set between 16 and 256 rows."""
        return 2.0 if self.rows <= 16 else 0.8 if self.rows >= 256 else 0.0

    @property
    def ratio(self) -> float:
        """cuBLAS's time by the packed product's."""
        return self.dense_us / self.packed_us

    @property
    def met(self) -> bool:
        """Whether both goals are met."""
        return self.ratio >= self.goal and self.packed_us <= self.decoded_us


# ---- kernels, compiled ahead of time ----


def candidates(sm: int, rows: int) -> Iterable[Cut]:
    """Cuts worth compiling beside the table's."""
    if rows <= FEW_ROWS:
        for height in (8,) if rows <= 8 else (8, 16) if rows <= 16 else (32,):
            for columns, stretch, warps in itertools.product((16, 32), (16, 32), (4, 12)):
                yield FewRows(height, columns, stretch, warps)
    if sm == 90 and rows > 16:
        for height, stages, line in itertools.product((32, 64, 128), (2, 3, 4), (32, 64, 128)):
            yield ManyRows(height, stages, line)
    if sm == 90 or rows <= FEW_ROWS:
        return
    for height, width, warps in [(64, 64, 4), (128, 64, 4), (128, 128, 8), (64, 128, 4), (256, 64, 4)]:
        yield Tile(height, width, 64, warps, 3)


def product_key(n: int, k: int, rows: int) -> str:
    """Of the fused kernels for one product."""
    return f"{n} {k} {rows}"


def decoder_key(shape: Sequence[int]) -> str:
    """Of the decoder for one weight."""
    return f"decode {' '.join(map(str, shape))}"


def compiled(sm: int, tune: bool, sizes: Sequence[int] = ROWS) -> Book:
    """All kernels of the benchmark, which takes no GPU; with ``tune``, also those that need more shared memory."""
    book: dict[str, list[Candidate]] = {}
    for n, k in LINEARS.values():
        book[decoder_key((n, k))] = [Candidate("", True, decode_kernel(sm, (n, k)))]
        for rows in sizes:
            table = tiles(sm, rows, k)
            cuts = [*table, *(cut for cut in candidates(sm, rows) if tune and cut not in table)]
            limit = SHARED_LIMIT[sm] * 1024 if tune else STATIC_LIMIT
            made = [(cut, matmul_kernels(sm, rows, n, k, limit=limit, cuts=(cut,))) for cut in cuts]
            book[product_key(n, k, rows)] = [
                Candidate(str(cut), cut in table and kernel.shared_bytes <= STATIC_LIMIT, kernel)
                for cut, kernels in made
                for kernel in kernels
            ]
    for shape, _ in CONVOLUTIONS.values():
        book[decoder_key(shape)] = [Candidate("", True, decode_kernel(sm, shape))]
    return book


def write_book(book: Book, path: Path) -> None:
    """Into a file of JSON."""
    plain = {
        key: [(each.tile, each.ships, each.kernel.text()) for each in kernels]
        for key, kernels in book.items()
    }
    path.write_text(json.dumps(plain))


def read_book(path: Path) -> Book:
    """The inverse of `write_book`."""
    return {
        key: [Candidate(tile, ships, read_kernels(text)[0]) for tile, ships, text in kernels]
        for key, kernels in json.loads(path.read_text()).items()
    }


class Loaded:
    """A compiled kernel in the GPU, launched on torch's stream."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), kernel.ptx.encode() + b"\0"))
        name = kernel.entry.encode()
        self._check(self._cuda.cuModuleGetFunction(ctypes.byref(self._function), module, name))
        if kernel.shared_bytes > STATIC_LIMIT:
            attribute = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._check(self._cuda.cuFuncSetAttribute(self._function, attribute, kernel.shared_bytes))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"{self.kernel.entry}: CUDA error {code}")

    def __call__(self, down: int, across: int, *arguments: Any) -> None:
        """Launches it over (down, across); tensors are passed as addresses, integers as 32 bits."""
        import torch

        values = [
            ctypes.c_int32(given) if isinstance(given, int) else ctypes.c_void_p(given.data_ptr())
            for given in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        programs = -(-down // self.kernel.rows) * -(-across // self.kernel.columns)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = (programs, 1, 1, self.kernel.threads, 1, 1, self.kernel.shared_bytes)
        self._check(self._cuda.cuLaunchKernel(self._function, *sizes, stream, pointers, None))


@functools.cache
def loaded(kernel: Kernel) -> Loaded:
    """Every text once."""
    return Loaded(kernel)


# ---- times ----


def clock(work: Sequence[Callable[[], Any]], repeats: int = 7) -> float:
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
    """A packed weight of random codes and what it decodes to, in as many copies as keep both out of the cache."""

    def __init__(self, shape: tuple[int, ...], book: Book) -> None:
        import torch

        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.shape, self.n, self.k = shape, shape[0], math.prod(shape[1:])
        self.taps = math.prod(shape[2:])
        assert order(shape, 4) != "taps", "channels of these layers come in fours"
        width = row_words(self.k, 4, 8)
        size = (self.n, width)
        copies = min(max(2 * cache // (4 * self.n * width), 2), 300)
        self.words = [
            torch.randint(-(2**31), 2**31 - 1, size, device="cuda", dtype=torch.int32) for _ in range(copies)
        ]
        self.codebooks = [
            (torch.randn(256, 4, device="cuda") / math.sqrt(self.k)).half().view(torch.int64)
            for _ in self.words
        ]
        self.scale = torch.ones(self.n, device="cuda")
        self.bias = torch.randn(self.n, device="cuda").half()
        self.decoder = loaded(book[decoder_key(shape)][0].kernel)
        self.weight = torch.empty(shape, device="cuda", dtype=torch.float16)
        self.decode(0)
        self.dense = [
            self.weight.clone() for _ in range(min(max(2 * cache // (2 * self.n * self.k), 2), 100))
        ]

    def decode(self, index: int) -> Any:
        """One of the weights, decoded; into one place."""
        arguments = (
            self.words[index],
            self.codebooks[index],
            self.scale,
            self.n,
            self.k,
            self.words[0].shape[1],
        )
        self.decoder(self.k, self.n, *arguments, self.taps, self.weight)
        return self.weight


def linear(name: str, layer: Layer, rows: int, sm: int, book: Book) -> Line:
    """Times one product."""
    import torch
    from torch.nn.functional import linear as dense

    n, k = layer.n, layer.k
    x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
    y = torch.empty(rows, n, device="cuda", dtype=torch.float16)
    expected = dense(x, layer.dense[0], layer.bias).float()
    count = len(layer.words) if rows <= 16 else min(len(layer.words), 40)

    def fused(kernel: Kernel, index: int) -> None:
        words = layer.words[index]
        given = (x, words, layer.codebooks[index], layer.scale, layer.bias, rows, n, k, words.shape[1], y)
        loaded(kernel)(rows, n, *given)

    timed: dict[Candidate, float] = {}
    error = 0.0
    for each in book[product_key(n, k, rows)]:
        y.fill_(math.nan)
        fused(each.kernel, 0)
        off = float((y.float() - expected).abs().max() / expected.abs().max())
        error = off if math.isnan(off) else max(error, off)
        timed[each] = clock([functools.partial(fused, each.kernel, i) for i in range(count)])
    return Line(
        layer=name,
        rows=rows,
        dense_us=clock([functools.partial(dense, x, weight, layer.bias) for weight in layer.dense]),
        fused_us=min(time for each, time in timed.items() if each.ships),
        decoded_us=clock([lambda i=i: dense(x, layer.decode(i), layer.bias) for i in range(count)]),  # type: ignore[misc]
        fused=fuses(sm, rows, n, k),
        error=error,
        tiles={each.tile: time for each, time in timed.items()},
    )


def convolution(name: str, layer: Layer, size: int) -> dict[str, Any]:
    """Times one convolution, dense and decoded first."""
    import torch
    from torch.nn.functional import conv2d

    x = torch.randn(2, layer.shape[1], size, size, device="cuda", dtype=torch.float16)
    run = functools.partial(conv2d, x, bias=layer.bias, padding=1)
    packed = range(min(len(layer.words), 50))
    dense = clock([functools.partial(run, weight) for weight in layer.dense[:50]])
    decode = clock([functools.partial(layer.decode, i) for i in packed])
    both = clock([lambda i=i: run(layer.decode(i)) for i in packed])  # type: ignore[misc]
    return {"layer": name, "dense_us": dense, "decode_us": decode, "both_us": both, "ratio": dense / both}


def measure(kernels: Path | None = None, tune: bool = False, sizes: Sequence[int] = ROWS) -> dict[str, Any]:
    """All lines, as plain data.

    Args:
        kernels: From `write_book`; None to compile them here.
        tune: Time other cuts too.
        sizes: Rows to time.

    Raises:
        UnsupportedOp: There is no GPU, or one without kernels.
        MissingDependency: There is no torch, or no Triton to compile with.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "torch", "kernels") from error
    if not torch.cuda.is_available():
        raise UnsupportedOp("no CUDA GPU was found: run it on a machine with one")
    sm = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    book = compiled(sm, tune, sizes) if kernels is None else read_book(kernels)
    lines = []
    for name, shape in LINEARS.items():
        layer = Layer(shape, book)
        lines += [linear(name, layer, rows, sm, book) for rows in sizes]
    return {
        "device": torch.cuda.get_device_name(),
        "sm": sm,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "lines": [
            {**vars(line), "packed_us": line.packed_us, "ratio": line.ratio, "met": line.met}
            for line in lines
        ],
        "convolutions": [
            convolution(n, Layer(shape, book), size) for n, (shape, size) in CONVOLUTIONS.items()
        ],
    }


def show(result: dict[str, Any]) -> None:
    """The tables, and the best tile of every number of rows."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    print(f"{result['device']}, sm_{result['sm']}, {versions}; microseconds\n")
    print(
        f"{'layer':18}{'rows':>6}{'cuBLAS':>9}{'packed':>9}{'ratio':>7}{'fused':>9}{'decode+':>9}{'error':>9}"
    )
    for line in result["lines"]:
        print(
            f"{line['layer']:18}{line['rows']:6}{line['dense_us']:9.2f}{line['packed_us']:9.2f}{line['ratio']:7.2f}"
            f"{line['fused_us']:9.2f}{line['decoded_us']:9.2f}{line['error']:9.1e} {'' if line['met'] else 'short'}"
        )
    met = sum(line["met"] for line in result["lines"])
    print(f"\n{met} of {len(result['lines'])} meet both goals")
    for rows in sorted({line["rows"] for line in result["lines"]}):
        lines = [line for line in result["lines"] if line["rows"] == rows]
        ratios = [line["ratio"] for line in lines]
        print(
            f"{rows:5} rows: ratio {statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        if any(len(line["tiles"]) > 4 for line in lines):
            shared = set.intersection(*(set(line["tiles"]) for line in lines))
            loss = {
                tile: statistics.geometric_mean(
                    line["tiles"][tile] / min(line["tiles"].values()) for line in lines
                )
                for tile in shared
            }
            for tile in sorted(loss, key=loss.__getitem__)[:3]:
                print(f"      {loss[tile]:.3f} of the best time of every layer: {tile}")
    print()
    for line in result["convolutions"]:
        print(
            f"{line['layer']:18}cuDNN{line['dense_us']:9.2f}  decode{line['decode_us']:9.2f}  "
            f"both{line['both_us']:9.2f}  ratio {line['ratio']:.2f}"
        )


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tune", action="store_true", help="time other cuts too")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=ROWS, metavar="N", help="of x; those with goals"
    )
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="compiled elsewhere")
    parser.add_argument("--compile", type=Path, metavar="FILE", help="compile the kernels and stop")
    parser.add_argument("--sm", type=int, default=87, help="with --compile, as 87")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    try:
        if given.compile:
            write_book(compiled(given.sm, given.tune, given.rows), given.compile)
            return 0
        result = measure(given.kernels, given.tune, given.rows)
    except (UnsupportedOp, MissingDependency) as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 0
    if given.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
