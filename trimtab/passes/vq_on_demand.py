"""Packed weights that are decoded right before they are needed, wherever a runtime is free to choose the order.

A decode depends on constants alone, so a runtime may well decode all weights first: ONNX Runtime did for DiT-XL/2, and
took as much memory as dense. Here the codes pass through a Reshape to their own shape, of which an empty part comes
from what the reader of the weight reads beside it:

    Reshape(codes, Concat(Shape(x, start=0, end=0), shape of the codes)) -> VQDequantize -> MatMul(x, W)

So a weight can be decoded only when x is there, and ONNX Runtime, which orders a graph by a search in depth, then runs
the reader at once. Exact: nothing is computed with x.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
        order = {node: place for place, node in enumerate(model.graph)}
        for node in [node for node in model.graph if vq_op.is_packed(node)]:
            name = node.outputs[0].name or node.name or vq_op.NAME
            codes, activation = node.inputs[0], _beside(node.outputs[0], order)
            if codes is None or codes.const_value is None:
                refused.append(Refusal(name, "its codes are computed: it waits for something already"))
            elif activation is None or activation.const_value is not None:
                refused.append(Refusal(name, "what reads it reads no activation"))
            else:
                _wait(model.graph, node, codes, activation)
                applied.append(name)
        if applied:
            model.graph.sort()  # a weight may stand far before its reader
        return PassResult(model, bool(applied), tuple(applied), tuple(refused))


def _beside(weight: ir.Value, order: Mapping[ir.Node, int]) -> ir.Value | None:
    """What the first reader of a weight multiplies it with: nothing before that one can depend on the weight."""
    reader, index = min(_readers(weight), key=lambda use: order[use[0]], default=(None, 0))
    if reader is None:
        return None
    return next((v for v in reader.inputs[:2] if v is not None and v is not reader.inputs[index]), None)


def _readers(weight: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Every node that multiplies with a weight, turned or not, and which of its inputs that is."""
    for reader, index in weight.uses():
        if reader.op_type in ("Transpose", "Reshape", "Cast"):
            yield from _readers(reader.outputs[0])
        else:
            yield reader, index


def _wait(graph: ir.Graph, node: ir.Node, codes: ir.Value, activation: ir.Value) -> None:
    assert codes.const_value is not None
    sizes = np.array(codes.const_value.shape.numpy(), np.int64)
    tape = ir.tape.Tape()
    nothing = tape.op("Shape", [activation], {"start": 0, "end": 0})
    shape = tape.op("Concat", [nothing, add_constant(graph, f"{codes.name}.shape", sizes)], {"axis": 0})
    same = tape.op("Reshape", [codes, shape])
    same.shape, same.type = ir.Shape(sizes.tolist()), ir.TensorType(codes.const_value.dtype)
    for part, made in zip(("nothing", "sizes", "waited"), tape.nodes, strict=True):
        made.outputs[0].name = f"{codes.name}.{part}"
        made.metadata_props.update(node.metadata_props)
    graph.insert_before(node, tape.nodes)
    node.replace_input_with(0, same)
