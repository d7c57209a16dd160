"""Packed weights without a plugin, in a form that TensorRT for RTX keeps packed in its engine.

Its builder computes at build time what depends on constants alone, and so would decode every weight. The one exception
is what a DequantizeLinear reads, for that is where quantised weights stand. So codes become INT8 numbers around zero
behind a DequantizeLinear with scale 1, and look-ups into the codebook behind that:

    codes - 128 (INT8) -> DequantizeLinear(1.0) -> Cast(INT32) -> Add(128) -> Gather(codebook) -> Reshape

Exact: a code is a whole number from -128 to 127, which every floating-point type here holds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.passes import vq_op
from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import add_constant

_MIDDLE = 128
"""Taken off a code so that 0 to 255 becomes -128 to 127."""


class DecodeFromInt8(Pass):
    """Replaces every `trimtab::VQDequantize` by standard operators on INT8 codes.

    Six-bit indices are stored one a byte here: 3 bits a weight become 4.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrites the packed weights of a graph."""
        applied, refused = [], []
        for node in [node for node in model.graph if vq_op.is_packed(node)]:
            name = node.outputs[0].name or node.name or vq_op.NAME
            codes = node.inputs[0]
            if codes is None or codes.const_value is None:
                refused.append(Refusal(name, "its codes are computed and not stored"))
                continue
            _rewrite(model.graph, node, codes.const_value.numpy(), name)
            applied.append(name)
        if applied and not refused:
            for identifier in [key for key in model.functions if key[:2] == (vq_op.DOMAIN, vq_op.NAME)]:
                del model.functions[identifier]
            if all(node.domain != vq_op.DOMAIN for node in model.graph):  # a plugin's node may be left
                model.opset_imports.pop(vq_op.DOMAIN, None)
        return PassResult(model, bool(applied), tuple(applied), tuple(refused))


def _rewrite(graph: ir.Graph, node: ir.Node, packed: npt.NDArray[Any], name: str) -> None:
    codebook = node.inputs[1]
    scale = node.inputs[2] if len(node.inputs) > 2 else None
    assert codebook is not None and codebook.const_value is not None
    shape = list(node.attributes.get_ints("shape"))
    columns = math.prod(shape[1:])
    count = -(-columns // codebook.const_value.shape.numpy()[1])
    codes = vq_op.unpack_indices(packed, node.attributes.get_int("index_bits"))[:, :count]
    tape = ir.tape.Tape()

    def constant(part: str, array: npt.NDArray[Any]) -> ir.Value:
        return add_constant(graph, f"{name}.{part}", array)

    centred = constant("int8", (codes.astype(np.int16) - _MIDDLE).astype(np.int8))
    plain = tape.op("DequantizeLinear", [centred, constant("one", np.array(1, np.float32))])
    whole = tape.op("Cast", [plain], {"to": ir.DataType.INT32.value})
    index = tape.op("Add", [whole, constant("middle", np.array(_MIDDLE, np.int32))])
    rows = tape.op("Gather", [codebook, index], {"axis": 0})
    if count * codebook.const_value.shape.numpy()[1] != columns:
        flat = tape.op("Reshape", [rows, constant("flat", np.array([shape[0], -1], np.int64))])
        ends = [
            constant(part, np.array([v], np.int64))
            for part, v in (("first", 0), ("last", columns), ("axis", 1))
        ]
        rows = tape.op("Slice", [flat, *ends])
    if scale is not None:
        flat = tape.op("Reshape", [rows, constant("rows", np.array([shape[0], columns], np.int64))])
        factor = tape.op("Reshape", [scale, constant("column", np.array([-1, 1], np.int64))])
        rows = tape.op("Mul", [flat, factor])
    weight = tape.op("Reshape", [rows, constant("shape", np.array(shape, np.int64))])
    for number, made in enumerate(tape.nodes):
        made.metadata_props.update(node.metadata_props)
        made.outputs[0].name = f"{name}.{number}"
    codes_value = node.inputs[0]
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [node.outputs[0]], [weight])
    if codes_value is not None and not codes_value.uses():
        del graph.initializers[codes_value.name or ""]
