"""The two plugins for TensorRT 10.9 and later: kernels travel in the graph, and TensorRT puts them into the engine.

A quickly deployable plugin with an ahead-of-time implementation hands TensorRT compiled PTX with its launch
parameters. An engine that was built so needs neither Python nor a library to run. The PTX was compiled where the
bundle was made and stands in the node's attribute ``kernels`` (`aot.write_kernels`), so the device that builds the
engine needs no compiler either.

No ``from __future__ import annotations`` here: TensorRT reads the annotations as types.
"""

import functools
from collections.abc import Sequence
from typing import Any, List, Tuple, Union  # noqa: UP035  TensorRT compares with these

import numpy as np
import numpy.typing as npt

from trimtab.errors import BundleError, TargetError
from trimtab.runtime.sessions.check import missing
from trimtab.targets.plugins.aot import Kernel, read_kernels

NAMESPACE = "trimtab"
MATMUL_OP = "TrimtabVQMatMul1"
DECODE_OP = "TrimtabVQDecode1"
"""With the version in the name: TensorRT prefers a native operator of the same name over a plugin, and a quickly
deployable plugin has no version of its own. The C++ library has the same two."""

FIRST_VERSION = (10, 9)

_TYPES = {"fp16": "FP16", "bf16": "BF16"}


def matmul_combination(kernels: tuple[Kernel, ...]) -> tuple[str, str, list[int]]:
    """Types, layouts and tactics of the product: inputs x, words, codebook, scale, bias, then the output."""
    half = _half(kernels)
    return f"{half}, INT32, {half}, FP32, {half}, {half}", "LINEAR", list(range(1, len(kernels) + 1))


def decode_combination(kernels: tuple[Kernel, ...]) -> tuple[str, str, list[int]]:
    """Types, layouts and tactics of the decoder: inputs words, codebook, scale, then the output."""
    half = _half(kernels)
    return f"INT32, {half}, FP32, {half}", "LINEAR", list(range(1, len(kernels) + 1))


def chosen(text: str, tactic: int) -> Kernel:
    """The kernel of a tactic; 0 is TensorRT's name for the default, the first.

    Raises:
        BundleError: There is no such kernel.
    """
    kernels = read_kernels(text)
    if not 0 <= tactic <= len(kernels):
        raise BundleError(
            f"tactic {tactic} was chosen of {len(kernels)} kernels: delete the timing cache and build again"
        )
    return kernels[max(tactic, 1) - 1]


def product(factors: Sequence[Any]) -> Any:
    """Of sizes that may be symbolic."""
    total = factors[0]
    for factor in factors[1:]:
        total = total * factor
    return total


def needs_library(version: str) -> bool:
    """Whether this version of TensorRT has no such plugins, and the C++ library serves in their place.

    Args:
        version: Such as "10.3.0.30".
    """
    return tuple(int(part) for part in version.split(".")[:2]) < FIRST_VERSION


def register() -> None:
    """Registers both plugins with TensorRT, once per process: before a graph with them is parsed.

    Raises:
        MissingDependency: TensorRT is not installed.
        TargetError: It is older than 10.9.
    """
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        raise missing("tensorrt") from error
    if needs_library(trt.__version__):
        raise TargetError(
            f"TensorRT {trt.__version__} has no plugins that carry their kernels, which came with 10.9: "
            "build the library for it (`trimtab build` does), or update TensorRT"
        )
    import tensorrt.plugin as trtp

    _register(trtp)


@functools.cache
def _register(trtp: Any) -> None:
    _register_matmul(trtp)
    _register_decode(trtp)


def _register_matmul(trtp: Any) -> None:
    name = f"{NAMESPACE}::{MATMUL_OP}"

    @trtp.register(name)  # type: ignore[untyped-decorator]
    def describe(
        x: trtp.TensorDesc,
        words: trtp.TensorDesc,
        codebook: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        kernels: str,
    ) -> trtp.TensorDesc:
        leading = tuple(x.shape_expr[i] for i in range(x.ndim - 1))
        return trtp.from_shape_expr((*leading, words.shape_expr[0]), dtype=x.dtype)

    @trtp.autotune(name)  # type: ignore[untyped-decorator]
    def combinations(
        x: trtp.TensorDesc,
        words: trtp.TensorDesc,
        codebook: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        kernels: str,
        outputs: Tuple[trtp.TensorDesc],  # noqa: UP006
    ) -> List[trtp.AutoTuneCombination]:  # noqa: UP006
        return [trtp.AutoTuneCombination(*matmul_combination(read_kernels(kernels)))]

    @trtp.aot_impl(name)  # type: ignore[untyped-decorator]
    def implement(
        x: trtp.TensorDesc,
        words: trtp.TensorDesc,
        codebook: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        kernels: str,
        outputs: Tuple[trtp.TensorDesc],  # noqa: UP006
        tactic: int,
    ) -> Tuple[Union[str, bytes], Union[str, bytes], trtp.KernelLaunchParams, trtp.SymExprs]:  # noqa: UP006, UP007
        kernel = chosen(kernels, tactic)
        m = product([x.shape_expr[i] for i in range(x.ndim - 1)])
        n, k, stride = words.shape_expr[0], x.shape_expr[x.ndim - 1], words.shape_expr[1]
        return _launch(trtp, kernel, m, n, (m, n, k, stride))


def _register_decode(trtp: Any) -> None:
    name = f"{NAMESPACE}::{DECODE_OP}"

    @trtp.register(name)  # type: ignore[untyped-decorator]
    def describe(
        words: trtp.TensorDesc,
        codebook: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        kernels: str,
        shape: npt.NDArray[np.int32],
    ) -> trtp.TensorDesc:
        # Asked for its type alone, it gets sizes that stand for none, and a number has nothing to become a size by:
        # TensorRT would take the last call's builder of expressions, which may be gone.
        unknown = words.shape_expr[0]
        sizes = [unknown] * len(shape) if unknown.is_fake else [int(size) for size in shape]
        return trtp.from_shape_expr(tuple(sizes), dtype=codebook.dtype)

    @trtp.autotune(name)  # type: ignore[untyped-decorator]
    def combinations(
        words: trtp.TensorDesc,
        codebook: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        kernels: str,
        outputs: Tuple[trtp.TensorDesc],  # noqa: UP006
    ) -> List[trtp.AutoTuneCombination]:  # noqa: UP006
        return [trtp.AutoTuneCombination(*decode_combination(read_kernels(kernels)))]

    @trtp.aot_impl(name)  # type: ignore[untyped-decorator]
    def implement(
        words: trtp.TensorDesc,
        codebook: trtp.TensorDesc,
        scale: trtp.TensorDesc,
        kernels: str,
        shape: npt.NDArray[np.int32],
        outputs: Tuple[trtp.TensorDesc],  # noqa: UP006
        tactic: int,
    ) -> Tuple[Union[str, bytes], Union[str, bytes], trtp.KernelLaunchParams, trtp.SymExprs]:  # noqa: UP006, UP007
        n, k, taps = int(shape[0]), int(np.prod(shape[1:])), int(np.prod(shape[2:]))
        rows, stride = words.shape_expr[0], words.shape_expr[1]
        return _launch(trtp, chosen(kernels, tactic), trtp.ShapeExpr(k), rows, (n, k, stride, taps))


def _launch(
    trtp: Any, kernel: Kernel, down: Any, across: Any, scalars: tuple[Any, ...]
) -> tuple[str, str, Any, Any]:
    """What TensorRT takes: name, PTX, launch parameters, and the scalars between the inputs and the output."""
    launch = trtp.KernelLaunchParams()
    launch.grid_x = trtp.cdiv(down, kernel.rows) * trtp.cdiv(across, kernel.columns)
    launch.block_x = kernel.threads
    launch.shared_mem = kernel.shared_bytes
    extra = trtp.SymIntExprs(len(scalars))
    for i, scalar in enumerate(scalars):
        extra[i] = trtp.SymInt32(scalar)
    return kernel.entry, kernel.ptx, launch, extra


def _half(kernels: tuple[Kernel, ...]) -> str:
    dtypes = {kernel.dtype for kernel in kernels}
    if len(dtypes) != 1 or not dtypes <= _TYPES.keys():
        raise BundleError(
            f"the kernels of one packed layer compute in {sorted(dtypes)}, and one of {sorted(_TYPES)} was needed: "
            "compile the bundle again"
        )
    return _TYPES[dtypes.pop()]
