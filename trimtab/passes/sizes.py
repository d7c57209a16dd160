"""Sizes taken from the tensors at hand, and not computed from the model's input all over again.

The exporter writes one chain of integer arithmetic from the sample's height and width to every Reshape and Resize
of the network. A part of such a graph cannot stand alone, and cannot run at another resolution than the chain
says. After this pass both can.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import add_constant
from trimtab.passes.scopes import SCOPES

_COPY, _INFER = 0, -1
"""What ONNX's Reshape understands by these sizes, with ``allowzero`` off."""

_OPERAND = {"Reshape": 1, "Resize": 3, "Expand": 1}
"""Operator -> which input holds the sizes of its result."""


class LocalizeSizes(Pass):
    """Rewrites the computed sizes of Reshape, Resize and Expand.

    A size becomes a number where the shapes say one; "the same as the input's" or "what is left" where Reshape
    can say so; else it is read off the nearest earlier tensor that has it. Exact: the sizes are equal, and so is
    every number. A place is refused where a result's shape is not known or no tensor has the size.
    """

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        applied: list[str] = []
        refused: list[Refusal] = []
        seen: dict[str, tuple[ir.Value, int]] = {}
        for value in graph.inputs:
            _remember(value, seen)
        for node in list(graph):
            operand = _OPERAND.get(node.op_type)
            if operand is not None and len(node.inputs) > operand and _computed(node, operand):
                where = node.name or node.outputs[0].name or node.op_type
                reason = _localize(graph, node, operand, seen)
                if reason is None:
                    applied.append(where)
                else:
                    refused.append(Refusal(where, reason))
            for value in node.outputs:
                _remember(value, seen)
        return PassResult(model, bool(applied), applied=tuple(applied), refused=tuple(refused))


def _computed(node: ir.Node, operand: int) -> bool:
    """Whether a node's sizes are computed, and not by this pass."""
    sizes = node.inputs[operand]
    return is_size(sizes) and not str(sizes and sizes.name).startswith(f"{node.outputs[0].name}/sizes")


_ARITHMETIC = frozenset(
    ("Shape", "Squeeze", "Unsqueeze", "Gather", "Slice", "Concat", "Reshape", "Cast", "Identity")
) | frozenset(("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "ConstantOfShape", "Equal", "Where"))
"""The last three are how TorchScript's exporter writes what `expand` leaves as it is."""


def is_size(value: ir.Value | None) -> bool:
    """Whether an integer is computed from shapes and constants alone."""
    if value is None or value.is_graph_input() or value.is_initializer() or value.dtype == ir.DataType.BOOL:
        return False
    stack, reached = [value], False
    known: set[ir.Value] = set()
    while stack:
        item = stack.pop()
        if item in known or item.is_initializer():
            continue
        known.add(item)
        node = item.producer()
        if node is None or node.op_type not in _ARITHMETIC or node.domain:
            return False
        if node.op_type == "Shape":
            reached = True
            continue
        if item.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
            return False
        stack.extend(v for v in node.inputs if v is not None)
    return reached


def _remember(value: ir.Value, seen: dict[str, tuple[ir.Value, int]]) -> None:
    if value.shape is None or value.dtype is None or not value.dtype.is_floating_point():
        return
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
            seen[canonical(dim.value)] = (value, axis)


@functools.lru_cache(maxsize=4096)
def canonical(expression: str) -> str:
    """The same text for two sizes that differ in spaces and needless brackets."""
    return ast.unparse(ast.parse(expression, mode="eval"))


def _dims(value: ir.Value | None) -> list[int | str] | None:
    if value is None or value.shape is None:
        return None
    dims: list[int | str] = []
    for dim in value.shape:
        if isinstance(dim, ir.SymbolicDim):
            if dim.value is None:
                return None
            dims.append(canonical(dim.value))
        else:
            dims.append(dim)
    return dims


def _localize(
    graph: ir.Graph, node: ir.Node, operand: int, seen: dict[str, tuple[ir.Value, int]]
) -> str | None:
    wanted, source = _dims(node.outputs[0]), _dims(node.inputs[0])
    if "axes" in node.attributes:
        return "its sizes are those of some axes alone"
    if wanted is None:
        return "the shape of its result is not known"
    reshape = node.op_type == "Reshape"
    if reshape and source is None:
        return "the shape of what it reads is not known"
    sizes: list[int | str] = list(wanted)
    if reshape and source is not None:
        if 0 in wanted:
            return "its result is empty"
        sizes = [
            _COPY if isinstance(d, str) and axis < len(source) and source[axis] == d else d
            for axis, d in enumerate(sizes)
        ]
        left = [axis for axis, d in enumerate(sizes) if isinstance(d, str)]
        if len(left) == 1:
            sizes[left[0]] = _INFER
    missing = [d for d in sizes if isinstance(d, str) and d not in seen]
    if missing:
        return f"no tensor before it has the size {missing[0]}"
    node.replace_input_with(operand, _vector(graph, node, sizes, seen))
    if reshape:
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    return None


def _vector(
    graph: ir.Graph, node: ir.Node, sizes: Sequence[int | str], seen: dict[str, tuple[ir.Value, int]]
) -> ir.Value:
    """The sizes as one int64 vector: runs of constants, and slices of tensors' shapes."""
    name = f"{node.outputs[0].name}/sizes"
    parts: list[ir.Value] = []
    start = 0
    while start < len(sizes):
        stop = start + 1
        if isinstance(sizes[start], str):
            value, axis = seen[str(sizes[start])]
            shape = ir.node("Shape", [value], {"start": axis, "end": axis + 1}, name=f"{name}/{start}")
            part = _insert(node, shape, 1)
        else:
            while stop < len(sizes) and not isinstance(sizes[stop], str):
                stop += 1
            part = add_constant(graph, f"{name}/{start}", np.array(sizes[start:stop], np.int64))
        parts.append(part)
        start = stop
    if len(parts) == 1:
        return parts[0]
    return _insert(node, ir.node("Concat", parts, {"axis": 0}, name=name), len(sizes))


def _insert(before: ir.Node, node: ir.Node, length: int) -> ir.Value:
    if scopes := before.metadata_props.get(SCOPES):
        node.metadata_props[SCOPES] = scopes
    output = node.outputs[0]
    output.name, output.type, output.shape = node.name, ir.TensorType(ir.DataType.INT64), ir.Shape([length])
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output
