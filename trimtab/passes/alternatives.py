"""Nodes that stand beside a graph's own, for calls that want other values in the place of some.

A call that names ``{v: tensor}`` among its inputs and ``{w: tensor}`` among its outputs reads w wherever the graph
reads v (`trimtab.passes.partition`). What a rewrite adds to a graph is therefore only what computes w.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trimtab.passes.constants import add_constant
from trimtab.passes.scopes import SCOPES

Dim = int | str | ir.SymbolicDim | None
"""A size, an expression, or None where nobody needs to know."""


class Alternatives:
    """Adds nodes behind a place of a graph.

    Args:
        graph: Is edited.
        place: The new nodes come right behind it; None for the graph's start.
        scope: The beginning of their names, and the module path that they carry where no module is given.
        module: The paths of a module that they are to be a part of, outermost first.
    """

    def __init__(
        self, graph: ir.Graph, place: ir.Node | None, scope: str, module: Sequence[str] = ()
    ) -> None:
        self.graph = graph
        self.module = module
        self._place = place
        self.scope = scope
        self._count = 0

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        dtype: ir.DataType,
        shape: Sequence[Dim],
        name: str | None = None,
    ) -> ir.Value:
        """A new node's only output."""
        node = ir.node(op, list(inputs), dict(attributes or {}))
        output = node.outputs[0]
        output.name = node.name = name or self._name(op.lower())
        output.type, output.shape = ir.TensorType(dtype), ir.Shape(list(shape))
        node.metadata_props[SCOPES] = repr(["", *(self.module or (self.scope,)), output.name])
        if self._place is not None:
            self.graph.insert_after(self._place, node)
        elif first := next(iter(self.graph), None):
            self.graph.insert_before(first, node)
        self._place = node
        return output

    def int_node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[Dim],
        **attributes: int,
    ) -> ir.Value:
        """The same for int64."""
        return self.node(op, inputs, attributes, dtype=ir.DataType.INT64, shape=shape)

    def ints(self, values: int | Sequence[int]) -> ir.Value:
        """An int64 constant, of no axes where a number is given."""
        return add_constant(self.graph, self._name("constant"), np.array(values, np.int64))

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{self.scope}/{kind}_{self._count}"


def behind(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Puts an Identity between a value and all its readers, and gives its output.

    A rewrite that computes from a value what others shall read in its place needs both under names of their own.
    """
    node = value.producer()
    assert node is not None and value.dtype is not None and value.shape is not None
    readers = list(value.uses())
    copy = Alternatives(graph, node, name).node(
        "Identity", [value], dtype=value.dtype, shape=list(value.shape), name=name
    )
    for user, index in readers:
        user.replace_input_with(index, copy)
    return copy


def relabel(start: ir.Value, stop: Collection[ir.Node]) -> None:
    """Names the open sizes of a value, and of all that follows from it, as what they are: sizes of their own.

    Where calls put another value in the place of ``start``, what follows has other sizes than the graph's inputs
    say. ``n + 0`` is n in the plain graph, and for everybody who compares names it is another size than n.

    Args:
        start: The first value.
        stop: Nodes that the way ends before.
    """
    stack, seen = [start], {start}
    while stack:
        value = stack.pop()
        if value.shape is not None:
            value.shape = ir.Shape([_relabelled(dim) for dim in value.shape])
        for user, _ in value.uses():
            if user not in stop and user.op_type != "Shape":
                following = [v for v in user.outputs if v not in seen]
                seen.update(following)
                stack.extend(following)


def _relabelled(dim: int | ir.SymbolicDim) -> int | str | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return re.sub(r"\b(latent_(?:height|width))\b", r"(\1 + 0)", dim.value)
