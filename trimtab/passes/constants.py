"""Constants that a pass brings into a graph."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def constant(name: str, array: npt.NDArray[Any] | ir.TensorProtocol) -> ir.Value:
    """A value with its tensor, of the array's dtype and shape. It is no graph's initializer yet.

    Args:
        name: Of the value; a tensor that is given must have it already.
        array: The numbers, or a tensor that says where they are.
    """
    tensor = array if isinstance(array, ir.TensorProtocol) else ir.tensor(array, name=name)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def add_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any] | ir.TensorProtocol) -> ir.Value:
    """A new initializer of a graph. The name must be free there."""
    value = constant(name, array)
    graph.register_initializer(value)
    return value
