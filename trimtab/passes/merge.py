"""Equal weights become one."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.passes.base import Pass, PassResult

_SAMPLES = 256
"""Bytes that are looked at before any tensor is read whole: chance makes two of them alike once in 256^256."""


class MergeWeights(Pass):
    """Initializers of the main graph with the same type, shape and bytes become the first of them. Exact.

    A DiT's 28 blocks bring the same embedders by 28 names, and an engine would hold 28 copies. Weights are compared and
    not hashed: those that differ, nearly all, differ in the few bytes that are read first, so a mapped file of
    gigabytes stays on its disk.
    """

    def call(self, model: ir.Model) -> PassResult:
        kept: dict[Hashable, list[ir.Value]] = {}
        merged = []
        graph = model.graph
        named = {*graph.inputs, *graph.outputs}
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or value in named or tensor.dtype == ir.DataType.STRING:
                continue
            data = _bytes(tensor)
            spread = np.linspace(0, max(0, data.size - 1), _SAMPLES).astype(np.int64)
            sample = data[spread].tobytes() if data.size else b""
            alike = kept.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), sample), [])
            for other in alike:
                assert other.const_value is not None
                if np.array_equal(_bytes(other.const_value), data):
                    value.replace_all_uses_with(other)
                    del graph.initializers[name]
                    merged.append(name)
                    break
            else:
                alike.append(value)
        return PassResult(model, bool(merged), tuple(merged))


def _bytes(tensor: ir.TensorProtocol) -> npt.NDArray[np.uint8]:
    """A tensor's bytes, without a copy where numpy has none to make."""
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
