"""Which operators compute, which only move, and which of their tensors may change type."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

FLOAT = ir.DataType.FLOAT

HEAVY = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum"))
"""Products of matrices: what a lower precision is for."""

MOVES = frozenset(
    [
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Identity",
        "Expand",
        "Tile",
        "Slice",
        "Split",
        "Concat",
        "Gather",
        "GatherND",
        "GatherElements",
        "Pad",
        "DepthToSpace",
        "SpaceToDepth",
        "Dropout",
        "MaxPool",
        "AveragePool",
        "GlobalMaxPool",
        "GlobalAveragePool",
        "ReduceMax",
        "ReduceMin",
        "Relu",
    ]
)
"""Operators whose results are no larger in magnitude than what they read."""

TYPELESS = frozenset(("Shape", "Size"))
"""Operators that read a tensor of any type, and only its sizes."""

_TYPED_BY = {"Cast": "to", "DequantizeLinear": "output_dtype"}
"""Operator -> the attribute that names the type of its result."""

_TYPE_STRINGS = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


@dataclass(frozen=True)
class Ports:
    """Where a node can take and give a lower type than float32.

    Attributes:
        inputs: Indices.
        outputs: Indices.
        attribute: Names the type of the result and must be set too; None for operators without one.
    """

    inputs: frozenset[int]
    outputs: frozenset[int]
    attribute: str | None = None


def ports(node: ir.Node, model: ir.Model, dtype: ir.DataType) -> Ports | None:
    """What of a node can be converted, by the operator's definition; None where nothing can.

    A function of the model's own can be converted as a whole where nothing in it names float32.

    Args:
        node: Of the main graph.
        model: Has the opset and the functions.
        dtype: FLOAT16 or BFLOAT16.
    """
    reads = {index for index, value in enumerate(node.inputs) if value is not None and value.dtype == FLOAT}
    gives = {index for index, value in enumerate(node.outputs) if value.dtype == FLOAT}
    if not gives or has_graph(node):
        return None
    function = model.functions.get(node.op_identifier())
    if function is not None:
        return None if _names_float(function) or not reads else Ports(frozenset(reads), frozenset(gives))
    if node.domain != "":
        return None
    signature = _signature(node.op_type, model.graph.opset_imports.get("", 1), dtype)
    if signature is None:
        return None
    reads = {index for index in reads if signature.input(index)[1]}
    attribute = _TYPED_BY.get(node.op_type)
    if attribute is not None:
        return Ports(frozenset(reads), frozenset(gives), attribute)
    # Statistics that a norm gives beside its result have a type of their own, as has what is random.
    kinds = {signature.input(index)[0] for index in reads}
    gives = {index for index in gives if signature.output(index)[1] and signature.output(index)[0] in kinds}
    return Ports(frozenset(reads), frozenset(gives)) if 0 in gives else None


@dataclass(frozen=True)
class _Signature:
    """For every formal parameter: its type variable, and whether that may be the lower type."""

    inputs: tuple[tuple[str, bool], ...]
    outputs: tuple[tuple[str, bool], ...]

    def input(self, index: int) -> tuple[str, bool]:
        return self.inputs[min(index, len(self.inputs) - 1)]  # the last may be variadic

    def output(self, index: int) -> tuple[str, bool]:
        return self.outputs[min(index, len(self.outputs) - 1)]


@functools.cache
def _signature(op_type: str, opset: int, dtype: ir.DataType) -> _Signature | None:
    import onnx

    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    able = {
        constraint.type_param_str: _TYPE_STRINGS[dtype] in constraint.allowed_type_strs
        for constraint in schema.type_constraints
    }

    def kinds(parameters: Any) -> tuple[tuple[str, bool], ...]:
        return tuple((p.type_str, able.get(p.type_str, False)) for p in parameters)

    return _Signature(kinds(schema.inputs), kinds(schema.outputs))


def has_graph(node: ir.Node) -> bool:
    """Whether a node, such as If, has a graph inside, which may read what the node's inputs do not say."""
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in graphs for attribute in node.attributes.values())


def _names_float(function: ir.Function) -> bool:
    """Whether something in a function is float32 whatever it is given."""
    for node in function:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == FLOAT:
                return True
            if attribute.name in ("value_float", "value_floats"):
                return True
            if attribute.name in ("to", "dtype", "output_dtype") and attribute.value == int(FLOAT):
                return True
    return False
