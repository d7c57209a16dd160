"""Packed weights that are decoded right before they are needed, wherever a runtime is free to choose the order.

A decode depends on constants alone, so a runtime may well decode all weights first: ONNX Runtime did for DiT-XL/2, and
took as much memory as dense. Here the codes pass through a Reshape to their own shape, of which an empty part comes
from what the reader of the weight reads beside it:

    Reshape(codes, Concat(Shape(x, start=0, end=0), shape of the codes)) -> VQDequantize -> MatMul(x, W)

So a weight can be decoded only when x is there, and ONNX Runtime, which orders a graph by a search in depth, then runs
the reader at once. Exact: nothing is computed with x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from trimtab.passes import vq_op
from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import add_constant


class DecodeOnDemand(Pass):
    """Lets every `trimtab::VQDequantize` wait for the activation that its weight is multiplied with."""

    def call(self, model: ir.Model) -> PassResult:
        """Puts three small nodes before each packed weight; a second run refuses them all."""
        applied, refused = [], []
        for node, reader in in_turn(model.graph):
            name = node.outputs[0].name or node.name or vq_op.NAME
            codes, activation = node.inputs[0], beside(reader)
            if codes is None or codes.const_value is None:
                refused.append(Refusal(name, "its codes are computed: it waits for something already"))
            elif activation is None:
                refused.append(Refusal(name, "what reads it reads no activation"))
            else:
                _wait(model.graph, node, codes, activation)
                applied.append(name)
        if applied:
            model.graph.sort()  # a weight may stand far before its reader
        return PassResult(model, bool(applied), tuple(applied), tuple(refused))


class Use(NamedTuple):
    """A node that multiplies with a weight, turned or not, and which of its inputs that is."""

    node: ir.Node
    input_index: int


def in_turn(graph: ir.Graph) -> list[tuple[ir.Node, Use | None]]:
    """The nodes of packed weights with their first readers, None where there is none, in the order of those."""
    order = {node: place for place, node in enumerate(graph)}
    packed = [node for node in graph if vq_op.is_packed(node)]
    first = {
        node: min(_uses(node.outputs[0]), key=lambda use: order[use.node], default=None) for node in packed
    }

    def place(node: ir.Node) -> int:
        use = first[node]
        return order[node if use is None else use.node]

    return [(node, first[node]) for node in sorted(packed, key=place)]


def beside(reader: Use | None) -> ir.Value | None:
    """The activation that a weight's first reader multiplies it with: nothing before it can depend on the weight."""
    if reader is None:
        return None
    node, index = reader
    other = next((v for v in node.inputs[:2] if v is not None and v is not node.inputs[index]), None)
    return None if other is None or other.const_value is not None else other


def _uses(weight: ir.Value) -> Iterator[Use]:
    for reader, index in weight.uses():
        if reader.op_type in ("Transpose", "Reshape", "Cast"):
            yield from _uses(reader.outputs[0])
        else:
            yield Use(reader, index)


def waiting(
    tape: ir.tape.Tape,
    graph: ir.Graph,
    value: ir.Value,
    shape: Sequence[int],
    others: Sequence[ir.Value],
    name: str,
) -> ir.Value:
    """A value in another shape, once others are there.

    Args:
        tape: Takes the nodes.
        graph: Takes the shape.
        value: Of a static size.
        shape: Of as many elements.
        others: Of any type and shape; nothing of them is read.
        name: What the names of the new values begin with.
    """
    sizes = add_constant(graph, f"{name}.shape", np.array(shape, np.int64))
    nothing = [tape.op("Shape", [other], {"start": 0, "end": 0}) for other in others]
    joined = tape.op("Concat", [*nothing, sizes], {"axis": 0})
    same = tape.op("Reshape", [value, joined])
    same.shape, same.type = ir.Shape(shape), value.type
    for number, empty in enumerate(nothing):
        empty.name = f"{name}.nothing_{number}"
    joined.name, same.name = f"{name}.sizes", f"{name}.waited"
    return same


def _wait(graph: ir.Graph, node: ir.Node, codes: ir.Value, activation: ir.Value) -> None:
    assert codes.const_value is not None
    tape = ir.tape.Tape()
    same = waiting(
        tape, graph, codes, codes.const_value.shape.numpy(), [activation], f"{node.outputs[0].name}.codes"
    )
    for made in tape.nodes:
        made.metadata_props.update(node.metadata_props)
    graph.insert_before(node, tape.nodes)
    node.replace_input_with(0, same)
