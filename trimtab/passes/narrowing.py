"""Weights in a lower type: which of them fit, and how they are rounded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.weights import INLINE_BYTES

LARGEST = {
    ir.DataType.FLOAT16: float(np.finfo(np.float16).max),
    ir.DataType.BFLOAT16: (2 - 2.0**-7) * 2.0**127,
}
"""The largest finite number of each type."""

FILL = 1e30
"""Nothing that a network computes comes near it: a number beyond stands for minus infinity in a mask."""

LOSS = 2.0**-10
"""The most that a weight may lose (relative, L2). Rounding takes at most 2**-11 of any number that is normal in FP16
(above 6.1e-5); a weight that loses twice as much lies where numbers are subnormal. BF16 has float32's exponents."""

_SCALES = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Mul", "Div"))
"""Operators that multiply or divide their first two inputs: the relative error of each is the result's. What is added
may be lost where it is tiny."""


def why_wide(value: ir.Value, node: ir.Node, dtype: ir.DataType) -> str | None:
    """Why a node's weight does not fit a type; None where it does."""
    tensor = value.const_value
    if tensor is None or tensor.size == 0:
        return None
    array = tensor.numpy()
    largest = max(float(array.max()), -float(array.min()))
    if LARGEST[dtype] < largest < FILL:
        return f"the weight {value.name} reaches {largest:.3g}, and the type ends at {LARGEST[dtype]:.5g}"
    multiplies = node.op_type in _SCALES and value in node.inputs[:2]
    if dtype == ir.DataType.FLOAT16 and multiplies and largest < FILL:
        norm = float(np.linalg.norm(array))
        loss = float(np.linalg.norm(array - array.astype(np.float16))) / norm if norm else 0.0
        if loss > LOSS:
            return f"the weight {value.name} is too small: it would lose {loss:.2g} of itself"
    return None


def narrowed(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """A float32 tensor in a lower type, rounded to nearest, converted whenever it is read.

    A finite number beyond the type becomes the largest there is, and not infinity: a mask's rows that are filled
    with it must still have a softmax.
    """

    def convert() -> ir.TensorProtocol:
        return ir.Tensor(_rounded(tensor.numpy(), dtype), dtype, name=name)

    if tensor.nbytes < INLINE_BYTES:
        return convert()
    return ir.LazyTensor(convert, dtype, ir.Shape(tensor.shape.numpy()), name=name)


def _rounded(array: npt.NDArray[np.float32], dtype: ir.DataType) -> npt.NDArray[np.generic]:
    largest = LARGEST[dtype]
    clamped = np.where(np.isfinite(array), np.clip(array, -largest, largest), array)
    return clamped.astype(dtype.numpy())
