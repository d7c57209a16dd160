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
    return ir.val(name, const_value=ir.tensor(array, name=name))


def add_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any] | ir.TensorProtocol) -> ir.Value:
    """A new initializer of a graph. The name must be free there."""
    value = constant(name, array)
    graph.register_initializer(value)
    return value


def shared_constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The initializer of this name, for all who ask for the same: a new one where it is not there yet."""
    known = graph.initializers.get(name)
    return add_constant(graph, name, array) if known is None else known
