"""Kernels compiled ahead of time: PTX for a named SM, made without a GPU, and its way into one text attribute."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from trimtab.errors import BuildFailed, BundleError, MissingDependency, first_line
from trimtab.targets.plugins import nvrtc
from trimtab.targets.plugins.tiles import DECODE, STATIC_LIMIT, Cut, FewRows, ManyRows, Tile, order, tiles

MATMUL = "vq_matmul"
DECODER = "vq_decode"

PTX_VERSIONS = {110: 90, 120: 87, 121: 88}
"""The oldest PTX that knows the SM, where it is not 8.0: every driver that runs the SM then takes it (PTX ISA,
release notes). JetPack 6 has CUDA 12.6, whose driver reads up to 8.5."""

_SEPARATOR = "\f"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, with what a launch needs to know.

    Attributes:
        entry: Its name in the PTX.
        rows: Of a tile; ceil(m / rows) * ceil(n / columns) programs are launched, on the x axis.
        columns: Of a tile.
        threads: Of one program.
        shared_bytes: Of dynamic shared memory.
        dtype: Of its tensors, "fp16" or "bf16".
        ptx: Its text.
    """

    entry: str
    rows: int
    columns: int
    threads: int
    shared_bytes: int
    dtype: str
    ptx: str

    def text(self) -> str:
        """One line of what a launch needs, then the PTX: what both plugins read."""
        numbers = f"{self.rows} {self.columns} {self.threads} {self.shared_bytes}"
        return f"{self.entry} {numbers} {self.dtype}\n{self.ptx}"


def write_kernels(kernels: tuple[Kernel, ...]) -> str:
    """Several kernels as one text attribute; tactic i of the plugins, from 1 on, is the i-th of them."""
    return _SEPARATOR.join(kernel.text() for kernel in kernels)


def read_kernels(text: str) -> tuple[Kernel, ...]:
    """The inverse of `write_kernels`.

    Raises:
        BundleError: The text was not written by it.
    """
    kernels = []
    for part in text.split(_SEPARATOR):
        line, _, ptx = part.partition("\n")
        words = line.split(" ")
        if (
            len(words) != 6
            or not all(re.fullmatch(r"[1-9][0-9]{0,8}", word) for word in words[1:4])
            or not re.fullmatch(r"[0-9]{1,9}", words[4])
            or f".entry {words[0]}(" not in ptx
        ):
            raise BundleError(
                f"a packed layer's kernel begins with {line[:60]!r}, which names no kernel: compile the bundle again"
            )
        rows, columns, threads, shared_bytes = map(int, words[1:5])
        kernels.append(Kernel(words[0], rows, columns, threads, shared_bytes, words[5], ptx))
    return tuple(kernels)


def check_kernels(sm: int) -> None:
    """Makes sure that kernels can be compiled for an SM, as in sm_87.

    Raises:
        UnsupportedOp: No kernel is compiled for it.
        MissingDependency: There is no Triton, or no compiler of CUDA's.
    """
    tiles(sm, 1, 1)
    _triton_kernels()
    nvrtc.library()


def matmul_kernels(
    sm: int,
    m: int,
    n: int,
    k: int,
    *,
    d: int = 4,
    bits: int = 8,
    dtype: str = "fp16",
    limit: int = STATIC_LIMIT,
    cuts: Sequence[Cut] = (),
) -> tuple[Kernel, ...]:
    """Kernels for a product of ``m`` rows with a packed (n, k) weight, the best guess first.

    Args:
        sm: As in sm_87.
        m: Rows of the left side: batch times tokens.
        n: Output channels.
        k: Input channels.
        d: Weights of one codeword, 2 or 4.
        bits: Of one code, 6 or 8.
        dtype: "fp16" or "bf16".
        limit: Bytes of shared memory that a kernel may ask for; kernels over it are left out.
        cuts: In place of the table's.

    Raises:
        UnsupportedOp: No kernel is compiled for this SM.
        BuildFailed: A compiler gave up.
        MissingDependency: There is no Triton, or no compiler of CUDA's.
    """
    kernels = []
    for cut in cuts or tiles(sm, m, k):
        if isinstance(cut, Tile):
            kernel = _compile_matmul(sm, cut, _divisor(n), _divisor(k), k % cut.depth == 0, d, bits, dtype)
        elif cut.shared_bytes(k, d, bits) <= limit:
            kernel = _compile_cuda(sm, cut, n, k, d, bits, dtype)
        else:
            continue
        if kernel.shared_bytes <= limit:
            kernels.append(kernel)
    assert kernels or cuts, "one cut of each list fits"
    return tuple(dict.fromkeys(kernels))  # in a shallow layer two cuts may be one


def decode_kernel(sm: int, shape: Sequence[int], *, d: int = 4, bits: int = 8, dtype: str = "fp16") -> Kernel:
    """The kernel that writes out a weight, from codes in the `order` of its shape.

    ``shape`` is (n, channels, taps...). The other arguments and the errors are those of `matmul_kernels`.
    """
    tiles(sm, 1, 1)
    n, k, arranged = shape[0], math.prod(shape[1:]), order(shape, d)
    tile = DECODE[arranged]
    signature = {"words": "*i32", "codebook": f"*i{16 * d}", "scale": "*fp32", **_SIZES, "taps": "i32",
                 "y": f"*{dtype}"}  # fmt: skip
    values = {"D": d, "BITS": bits, "ORDER": arranged, "SHARED": tile.shared, "BLOCK_N": tile.columns,
              "BLOCK_K": tile.rows}  # fmt: skip
    # The last axis of the tile is the depth here, so a launch counts programs over (n, k) as it does over (n, m).
    return _compile(DECODER, sm, signature, values, {"n": _divisor(n), "k": _divisor(k), "stride": 4}, tile)


_SIZES = {"n": "i32", "k": "i32", "stride": "i32"}


def _divisor(size: int) -> int:
    """The largest power of two up to 16 that divides a size: how wide its rows can be read."""
    return min(size & -size, 16)


def macros(cut: FewRows | ManyRows, n: int, k: int, d: int, bits: int, dtype: str) -> dict[str, int]:
    """What a source of `nvrtc.SOURCES` leaves open. The arguments are those of `matmul_kernels`."""
    from trimtab.targets.plugins.codes import row_words  # which needs onnx; who reads kernels does not

    return {"N": n, "K": k, "STRIDE": row_words(k, d, bits), "D": d, "BITS": bits,
            "BFLOAT16": int(dtype == "bf16"), **cut.constants(k, d, bits)}  # fmt: skip


@functools.lru_cache(maxsize=256)
def _compile_cuda(sm: int, cut: FewRows | ManyRows, n: int, k: int, d: int, bits: int, dtype: str) -> Kernel:
    ptx = trimmed(nvrtc.compile_ptx(cut.source, sm, macros(cut, n, k, d, bits, dtype)), arguments=10)
    version = f".version {PTX_VERSIONS.get(sm, 80) / 10}"  # the compiler writes its own
    return Kernel(
        entry=MATMUL,
        rows=cut.rows,
        columns=cut.columns,
        threads=cut.threads(k, d, bits),
        shared_bytes=cut.shared_bytes(k, d, bits),
        dtype=dtype,
        ptx=re.sub(r"^\.version .*", version, ptx, count=1, flags=re.MULTILINE),
    )


@functools.lru_cache(maxsize=256)
def _compile_matmul(
    sm: int, tile: Tile, by_n: int, by_k: int, even: bool, d: int, bits: int, dtype: str
) -> Kernel:
    kernels = _triton_kernels()
    signature = {"x": f"*{dtype}", "words": "*i32", "codebook": f"*i{16 * d}", "scale": "*fp32",
                 "bias": f"*{dtype}", "m": "i32", **_SIZES, "y": f"*{dtype}"}  # fmt: skip
    values = kernels.constants(tile, even, d, bits)
    return _compile(MATMUL, sm, signature, values, {"n": by_n, "k": by_k, "stride": 4}, tile)


def _compile(
    name: str,
    sm: int,
    signature: dict[str, str],
    values: Mapping[str, int | bool | str],
    divisors: dict[str, int],
    tile: Tile,
) -> Kernel:
    kernels = _triton_kernels()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Pointers are those of whole tensors, which TensorRT aligns; the sizes' divisors are those of this layer.
    hints = {}
    for place, (argument, kind) in enumerate(signature.items()):
        divisor = 16 if kind.startswith("*") else divisors.get(argument, 1)
        if divisor > 1:
            hints[(place,)] = [["tt.divisibility", divisor]]
    source = ASTSource(
        getattr(kernels, name), {**signature, **dict.fromkeys(values, "constexpr")}, dict(values), hints
    )
    options = {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "ptx_version": PTX_VERSIONS.get(sm, 80),
        "enable_fp_fusion": True,
    }
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:  # Triton's compiler raises whatever its stages do
        raise BuildFailed(
            f"Triton {triton.__version__} could not compile {name} for sm_{sm} ({first_line(error)}): upgrade triton, "
            "with torch where that pins it"
        ) from error
    return Kernel(
        entry=compiled.metadata.name,
        rows=tile.rows,
        columns=tile.columns,
        threads=32 * compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        dtype=signature["y"][1:],
        ptx=trimmed(compiled.asm["ptx"], len(signature)),
    )


def _triton_kernels() -> ModuleType:
    try:
        from trimtab.targets.plugins import kernels
    except ModuleNotFoundError as error:
        raise MissingDependency(error.name or "triton", "kernels") from error
    return kernels


def trimmed(ptx: str, arguments: int) -> str:
    """PTX without what only a debugger reads, and without the parameters that Triton adds for its own launcher.

    Triton appends pointers to scratch memory, which these kernels do not have. Who launches with the kernel's own
    arguments alone would make the driver read past the end of the list, so they have to go.

    Args:
        ptx: As Triton or NVRTC writes it: one entry.
        arguments: How many of its parameters are the kernel's own.

    Raises:
        BuildFailed: One of the added parameters is used.
    """
    head, _, rest = ptx.partition(".entry ")
    listed, _, body = rest.partition(")")
    name, _, parameters = listed.partition("(")
    wanted = [p.strip() for p in parameters.split(",\n")]
    for extra in wanted[arguments:]:
        symbol = extra.split()[-1]
        if re.search(rf"\b{re.escape(symbol)}\b", body):
            raise BuildFailed(
                f"{name} uses {symbol}, scratch memory that nobody would give it: use a smaller tile"
            )
    body = body.partition("\n\t.section\t")[0]  # .debug_*, the last thing in the text
    text = f"{head}.entry {name}(\n\t" + ",\n\t".join(wanted[:arguments]) + f"\n){body}"
    kept = [
        line.partition("//")[0].rstrip()
        for line in text.splitlines()
        if not re.match(r"\s*(//|\.loc\s|\.file\s|\$L__tmp|$)", line)
    ]
    return "\n".join(kept).replace(", debug\n", "\n") + "\n"
