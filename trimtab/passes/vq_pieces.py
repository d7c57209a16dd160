"""Large packed weights that few rows are multiplied with, in pieces whose decoded numbers stay in the cache.

A product of two rows reads every number of its weight once, and takes no longer than writing and reading the decoded
weight does: for DiT-XL/2's modulations 32 MB each, a third of all weights. In pieces of their output channels, each
decoded and multiplied with before the next, they never reach the memory:

    Gemm(x, W, b) -> Concat(Gemm(x, W[:n], b[:n]), Gemm(x, W[n:], b[n:]), ...)

Every output channel is the same sum as before. Many rows would take longer: their results are large, and are copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from trimtab.passes import vq_op
from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import add_constant
from trimtab.passes.vq_on_demand import Use, beside, in_turn

PIECE = 1 << 20
"""Numbers of a piece: 4 MiB in FP32, which the last caches of small processors hold as well."""


class SplitFewRows(Pass):
    """Splits packed weights by output channels where the other factor is a matrix, as of one row a picture.

    Args:
        numbers: Of a piece, at the most.
    """

    def __init__(self, numbers: int = PIECE) -> None:
        self.numbers = numbers

    def call(self, model: ir.Model) -> PassResult:
        """Rewrites the products; what is small enough is refused, so a second run does nothing."""
        applied, refused = [], []
        for node, use in in_turn(model.graph):
            name = node.outputs[0].name or node.name or vq_op.NAME
            if reason := _obstacle(node, use, self.numbers):
                refused.append(Refusal(name, reason))
            elif use is not None:
                _split(model.graph, node, use.node, self.numbers)
                applied.append(name)
        return PassResult(model, bool(applied), tuple(applied), tuple(refused))


def _obstacle(packed: ir.Node, use: Use | None, numbers: int) -> str | None:
    if use is None or use.node.op_type not in ("MatMul", "Gemm") or use.input_index != 1:
        return "no product reads it as its second factor"
    activation = beside(use)
    if activation is None or activation.shape is None or len(activation.shape) != 2:
        return "what it is multiplied with may have many rows"
    if math.prod(packed.attributes["shape"].as_ints()) <= numbers:
        return "it is small"
    factor = use.node.inputs[1]
    assert factor is not None
    if len(packed.outputs[0].uses()) > 1 or len(factor.uses()) > 1:
        return "several products read it"
    codes, added = packed.inputs[0], [value for value in use.node.inputs[2:] if value is not None]
    if codes is None or codes.const_value is None or any(not _is_vector(value) for value in added):
        return "its codes are computed, or what is added is no vector of constants"
    return None


def _is_vector(value: ir.Value) -> bool:
    return value.const_value is not None and len(value.const_value.shape) == 1 and value.const_value.size > 1


def _split(graph: ir.Graph, packed: ir.Node, product: ir.Node, numbers: int) -> None:
    weight, result, factor = packed.outputs[0], product.outputs[0], product.inputs[1]
    codes, codebook, *scale = packed.inputs
    x, _, *added = product.inputs
    assert factor is not None
    turned = factor.producer() if factor is not weight else None
    channels, width = packed.attributes["shape"].as_ints()
    step = -(-channels // -(-channels * width // numbers))
    tape = ir.tape.Tape()
    results = []
    for start in range(0, channels, step):
        stop = min(start + step, channels)

        def part(value: ir.Value | None, rows: slice = slice(start, stop)) -> ir.Value | None:
            return None if value is None else _rows(graph, value, rows)

        shape = ir.AttrInt64s("shape", [stop - start, width])
        piece = _again(tape, packed, [part(codes), codebook, *map(part, scale)], shape)
        piece.name, piece.type = f"{weight.name}.{start}", weight.type
        piece.shape = ir.Shape([stop - start, width])
        if turned is not None:
            piece = _again(tape, turned, [piece])
        results.append(_again(tape, product, [x, piece, *map(part, added)]))
    joined = tape.op("Concat", results, {"axis": 1})
    for number, node in enumerate(tape.nodes):
        node.outputs[0].name = node.outputs[0].name or f"{weight.name}.part_{number}"
        node.metadata_props.update(product.metadata_props)
    old = [node for node in (product, turned, packed) if node is not None]
    ir.convenience.replace_nodes_and_values(graph, product, old, tape.nodes, [result], [joined])


def _again(
    tape: ir.tape.Tape, node: ir.Node, inputs: Sequence[ir.Value | None], *changed: ir.Attr
) -> ir.Value:
    """The result of the same node for other inputs, with some attributes changed."""
    attributes = {**node.attributes, **{attribute.name: attribute for attribute in changed}}
    return tape.op(node.op_type, inputs, attributes, domain=node.domain, overload=node.overload)


def _rows(graph: ir.Graph, value: ir.Value, rows: slice) -> ir.Value:
    """Some rows of a constant: of a file's, the place of theirs in the file."""
    name = f"{value.name}.rows_{rows.start}_{rows.stop}"
    if name in graph.initializers:  # of a constant that several products have in common
        return graph.initializers[name]
    tensor = value.const_value
    assert tensor is not None
    if not isinstance(tensor, ir.ExternalTensor):
        return add_constant(graph, name, tensor.numpy()[rows])
    count, *sizes = tensor.shape.numpy()
    row, shape = tensor.nbytes // count, [rows.stop - rows.start, *sizes]
    place = ir.ExternalTensor(
        tensor.location,
        (tensor.offset or 0) + rows.start * row,
        shape[0] * row,
        tensor.dtype,
        shape=ir.Shape(shape),
        name=name,
        base_dir=tensor.base_dir,
    )
    return add_constant(graph, name, place)
