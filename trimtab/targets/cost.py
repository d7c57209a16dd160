"""What every node of a graph costs: multiplications, and bytes to and from memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from trimtab.passes.propagation import Extents, propagate

VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"))
"""Operators whose result is their first input's memory under other sizes."""


@dataclass(frozen=True)
class Cost:
    """What a node costs, or several together.

    Attributes:
        macs: Multiplications with an addition, of matrix products, convolutions and attention; all else counts 0.
        weight_bytes: Of the initializers that are read.
        read_bytes: Of the other tensors that are read.
        written_bytes: Of the tensors that are made. Views read and write nothing.
    """

    macs: int = 0
    weight_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.weight_bytes + other.weight_bytes,
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
        )

    @property
    def bytes(self) -> int:
        """All bytes that move."""
        return self.weight_bytes + self.read_bytes + self.written_bytes


def node_costs(model: ir.Model, inputs: Mapping[str, Sequence[int]]) -> dict[ir.Node, Cost]:
    """The cost of every node, in the graph's order.

    Exact counts of the graph as it is written, each tensor read once by each of its readers: nothing that a
    backend fuses is taken off.

    Args:
        model: Not changed.
        inputs: Graph input -> sizes.

    Raises:
        PassError: Sizes that do not follow from the inputs'.
    """
    extents = propagate(model, inputs)
    return {node: node_cost(node, extents) for node in model.graph}


def node_cost(node: ir.Node, extents: Extents) -> Cost:
    """The cost of one node, whose tensors take this."""
    if node.op_type in VIEWS or node.op_type in ("Shape", "Size", "Constant"):
        return Cost()
    read = dict.fromkeys(value for value in node.inputs if value is not None)  # x * x reads x once
    return Cost(
        macs=macs(node, extents),
        weight_bytes=sum(extents[v].bytes for v in read if v.is_initializer()),
        read_bytes=sum(extents[v].bytes for v in read if not v.is_initializer()),
        written_bytes=sum(extents[v].bytes for v in node.outputs if v in extents),
    )


def macs(node: ir.Node, extents: Extents) -> int:
    """Multiplications with an addition of one node; 0 for whatever is no product of matrices."""
    shapes = [() if value is None else extents[value].shape for value in node.inputs]
    result = extents[node.outputs[0]].elements
    match node.op_type:
        case "MatMul" | "MatMulInteger":
            return result * shapes[0][-1]
        case "Gemm":
            return result * shapes[0][0 if node.attributes.get_int("transA", 0) else 1]
        case "Conv" | "ConvInteger":
            return result * math.prod(shapes[1][1:])  # (out, in / groups, *kernel)
        case "ConvTranspose":
            return math.prod(shapes[0]) * math.prod(shapes[1][1:])  # (in, out / groups, *kernel)
        case "MatMulNBits":
            return result * node.attributes.get_int("K", 0)
        case "Attention":
            return _attention(node, shapes)
        case "Einsum":
            return _einsum(node.attributes.get_string("equation", ""), shapes)
    return 0


def _attention(node: ir.Node, shapes: list[tuple[int, ...]]) -> int:
    """Queries by keys, and scores by values: rows x heads x queries x keys x (head size + value's head size)."""
    query, key, value = shapes[:3]
    past = shapes[4][-2] if len(shapes) > 4 and shapes[4] else 0
    if len(query) == 4:  # (rows, heads, tokens, head size)
        heads, head, value_head = query[1], query[3], value[3]
    else:  # (rows, tokens, heads x head size)
        heads = node.attributes.get_int("q_num_heads", 1)
        head = query[2] // heads
        value_head = value[2] // node.attributes.get_int("kv_num_heads", heads)
    return query[0] * heads * query[-2] * (key[-2] + past) * (head + value_head)


def _einsum(equation: str, shapes: list[tuple[int, ...]]) -> int:
    """All letters' sizes multiplied, where there is more than one operand."""
    letters = [term.strip() for term in equation.partition("->")[0].split(",")]
    if len(letters) < 2 or "..." in equation:
        return 0
    return math.prod(
        {
            name: size
            for term, shape in zip(letters, shapes, strict=False)
            for name, size in zip(term, shape, strict=False)
        }.values()
    )
