"""Constants that a pass brings into a graph."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def constant(name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A value with its tensor, of the array's dtype and shape. It is no graph's initializer yet."""
    tensor = ir.tensor(array, name=name)
    return ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def add_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """A new initializer of a graph. The name must be free there."""
    value = constant(name, array)
    graph.register_initializer(value)
    return value
