"""Attention to a part of the queries at a time, for backends that hold all scores at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import add_constant
from trimtab.passes.propagation import Extents, propagate
from trimtab.passes.scopes import place

MOST_BYTES = 64 << 20
"""Of scores at a time: small beside weights of gigabytes, and large beside what a processor caches."""


class SplitAttention(Pass):
    """Splits the queries of attentions whose scores, rows x heads x queries x keys, take more than a bound.

    Exact up to the order in which a product of matrices sums: the softmax is over the keys, which stay whole.

    Args:
        inputs: Graph input -> sizes. The graph still takes others, with parts as many.
        most_bytes: The bound.
    """

    def __init__(self, inputs: Mapping[str, Sequence[int]], most_bytes: int = MOST_BYTES) -> None:
        self.inputs = inputs
        self.most_bytes = most_bytes

    def call(self, model: ir.Model) -> PassResult:
        """Edits the graph.

        Raises:
            PassError: Sizes that do not follow from the inputs'.
        """
        attentions = [node for node in model.graph if node.op_type == "Attention"]
        extents = propagate(model, self.inputs) if attentions else {}
        applied, refused = [], []
        for node in attentions:
            if (parts := self._parts(node, extents)) < 2:
                continue
            if reason := _reason_against(node):
                refused.append(Refusal(place(node), reason))
                continue
            _split(model.graph, node, parts)
            applied.append(place(node))
        return PassResult(model, bool(applied), tuple(applied), tuple(refused))

    def _parts(self, node: ir.Node, extents: Extents) -> int:
        query, key = (extents[value] for value in node.inputs[:2] if value is not None)
        if len(query.shape) != 4:
            return 1
        scores = query.shape[0] * query.shape[1] * key.shape[2] * query.dtype.bitwidth // 8  # of one query
        return -(-query.shape[2] // max(1, self.most_bytes // max(1, scores)))


def _reason_against(node: ir.Node) -> str | None:
    if node.attributes.get_int("is_causal", 0) or any(value is not None for value in node.inputs[3:]):
        return "its queries are masked, or follow others"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its scores or caches are read"
    return None


def _split(graph: ir.Graph, node: ir.Node, parts: int) -> None:
    query, result = node.inputs[0], node.outputs[0]
    assert query is not None
    tape = ir.tape.Tape()

    def constant(part: str, *numbers: int) -> ir.Value:
        return add_constant(graph, f"{result.name}.{part}", np.array(numbers, np.int64))

    # No part may be empty, so a small picture's queries are filled up with zeros, whose results are cut off again.
    queries = tape.op("Shape", [query], {"start": 2, "end": 3})
    filled = tape.op("Max", [queries, constant("count", parts)])
    pads = tape.op("Concat", [constant("none", 0), tape.op("Sub", [filled, queries])], {"axis": 0})
    axis = constant("axis", 2)
    padded = tape.op("Pad", [query, pads, None, axis])
    # Part k begins at k * queries / parts, rounded down: as even as can be, whatever the size of the picture.
    bounds = tape.op("Mul", [filled, constant("parts", *range(parts + 1))])
    bounds = tape.op("Div", [bounds, constant("divisor", parts)])
    begins = tape.op("Slice", [bounds, constant("first", 0), constant("last", parts)])
    ends = tape.op("Slice", [bounds, constant("second", 1), constant("end", parts + 1)])
    sizes = tape.op("Sub", [ends, begins])
    for number, each in enumerate(tape.nodes):
        each.outputs[0].name = f"{result.name}.split.{number}"
    padded.type = query.type
    split = ir.node("Split", [padded, sizes], {"axis": 2}, num_outputs=parts)
    made = [*tape.nodes, split]
    joins: list[ir.Value] = []
    for part in split.outputs:
        part.type = query.type
        attributes = list(node.attributes.values())
        made.append(ir.Node("", "Attention", [part, *node.inputs[1:]], attributes, num_outputs=1))
        made[-1].outputs[0].type = result.type
        joins.append(made[-1].outputs[0])
    together = ir.node("Concat", joins, {"axis": 2})
    together.outputs[0].name, together.outputs[0].type = f"{result.name}.joined", result.type
    made.append(together)
    joined = ir.node("Slice", [together.outputs[0], constant("start", 0), queries, axis])
    joined.outputs[0].type, joined.outputs[0].shape = result.type, result.shape
    made.append(joined)
    for each in made:
        each.metadata_props.update(node.metadata_props)
    graph.insert_after(node, made)
    name = result.name
    ir.convenience.replace_all_uses_with(result, joined.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    joined.outputs[0].name = name
