"""Packed weights whose codewords are looked up as single numbers.

ONNX Runtime's Gather copies codeword by codeword, 1.6 ns each on two cores. Its GatherElements takes 0.25 ns for a
number of eight bytes, and a codeword is one: four numbers of FP16. No operator reads an INT64 as four FP16, but two
names of one buffer do, of which a session sees to (`trimtab.manifest.VIEWS`):

    GatherElements(codewords, codes) -> output of the graph, INT64
                                        input of the graph, FP16 -> Cast -> W

Nothing but the order of the nodes says then when the buffer holds what. So each such input waits for its output, and
each look-up for the weight before to be through with the buffer, by shapes of which nothing is read, as in
`vq_on_demand`. Exact: codewords are numbers of FP16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.manifest import VIEWS
from trimtab.passes import vq_op
from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import add_constant
from trimtab.passes.vq_on_demand import beside, in_turn, waiting

_WIDE = {2: np.int32, 4: np.int64}
"""Numbers of FP16 in a codeword -> the integer of as many bytes."""

_Tables = dict[tuple[ir.Value, int], ir.Value]
"""Codebook and number of rows -> the table: pieces of a weight share theirs."""

_PARTS = 16
"""Rows of the table, all alike: GatherElements works on each with one thread."""


class DecodeThroughViews(Pass):
    """Replaces every `trimtab::VQDequantize` whose codewords fit, each to be decoded right before it is needed."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrites packed weights in the order of the graph, which must be one that can be run.

        What is refused: codes of six bits, or computed; codebooks of another type or with numbers that FP16 has not;
        weights beside no activation.
        """
        applied, refused = [], []
        before: ir.Value | None = None
        tables: _Tables = {}
        for node, reader in in_turn(model.graph):
            name = node.outputs[0].name or node.name or vq_op.NAME
            codes, codewords, activation = node.inputs[0], _codewords(node.inputs[1]), beside(reader)
            if codes is None or codes.const_value is None or node.attributes.get_int("index_bits", 8) != 8:
                refused.append(Refusal(name, "its codes are computed, or of six bits"))
            elif codewords is None:
                refused.append(Refusal(name, "its codewords are not two or four numbers of FP16, in FP32"))
            elif reader is None or activation is None:
                refused.append(Refusal(name, "what reads it reads no activation"))
            else:
                turn = [activation] if before is None else [activation, before]
                _look_up(model.graph, node, codewords, turn, tables)
                before = reader.node.outputs[0]
                applied.append(name)
        if applied:
            model.graph.sort()  # a weight may stand far before its reader
        return PassResult(model, bool(applied), tuple(applied), tuple(refused))


def _codewords(codebook: ir.Value | None) -> npt.NDArray[Any] | None:
    """A codebook (k, d) as k integers, each of the bytes of a codeword in FP16; None where it cannot be."""
    if codebook is None or codebook.const_value is None or codebook.dtype != ir.DataType.FLOAT:
        return None
    array = codebook.const_value.numpy()
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(array.astype(np.float16))
    wide = _WIDE.get(array.shape[1])
    return half.view(wide).reshape(-1) if wide is not None and np.array_equal(half, array) else None


def _look_up(
    graph: ir.Graph, node: ir.Node, codewords: npt.NDArray[Any], turn: Sequence[ir.Value], tables: _Tables
) -> None:
    """Puts the nodes in the place of one.

    Args:
        graph: The node's.
        node: Decodes a weight.
        codewords: Its own (k,), as integers.
        turn: What must be there before it is its turn.
        tables: Those of before; takes a new one.
    """
    codes, codebook, *scale = node.inputs
    weight = node.outputs[0]
    assert codes is not None and codes.const_value is not None and codebook is not None
    rows, row = codes.const_value.shape.numpy()
    columns = row * codewords.itemsize // 2
    parts = math.gcd(rows * row, _PARTS)
    shape = node.attributes["shape"].as_ints()
    name = f"{VIEWS}{weight.name}"
    tape = ir.tape.Tape()

    def constant(what: str, array: npt.ArrayLike) -> ir.Value:
        return add_constant(graph, f"{name}.{what}", np.asarray(array))

    flat = waiting(tape, graph, codes, [parts, rows * row // parts], turn, f"{name}.codes")
    indices = tape.op("Cast", [flat], {"to": ir.DataType.INT32})
    wide = ir.Value(name=f"{name}.written", shape=flat.shape, type=_type(codewords.dtype))
    key = (codebook, parts)
    if key not in tables:
        tables[key] = tape.op("Expand", [constant("codewords", codewords), constant("parts", [parts, 1])])
    tape.op("GatherElements", [tables[key], indices], {"axis": 1}, output=wide)
    graph.outputs.append(wide)
    half = ir.Value(name=name, shape=ir.Shape([rows, columns]), type=_type(np.dtype(np.float16)))
    graph.inputs.append(half)
    read = waiting(tape, graph, half, [rows, columns], [wide], f"{name}.read")
    numbers = tape.op("Cast", [read], {"to": ir.DataType.FLOAT})
    if columns != math.prod(shape[1:]):
        ends = [constant(what, [n]) for what, n in (("start", 0), ("end", math.prod(shape[1:])), ("axis", 1))]
        numbers = tape.op("Slice", [numbers, *ends])
    if scale and scale[0] is not None:
        numbers = tape.op("Mul", [numbers, tape.op("Reshape", [scale[0], constant("column", [-1, 1])])])
    if list(shape) != [rows, math.prod(shape[1:])]:
        numbers = tape.op("Reshape", [numbers, constant("size", shape)])
    for number, made in enumerate(tape.nodes):
        made.outputs[0].name = made.outputs[0].name or f"{name}.{number}"
        made.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [weight], [numbers])


def _type(dtype: np.dtype[Any]) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(dtype))
