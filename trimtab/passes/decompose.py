"""Operators written in terms of older ones, for parsers that do not know them.

Every decomposition follows the operator's definition in the ONNX standard (https://onnx.ai/onnx/operators/) and wants
the fixed sizes that `trimtab.passes.specialize` leaves behind. In float32 they agree with ONNX Runtime's own kernels to
1e-5; they are exact in real arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import constant
from trimtab.passes.scopes import place


class DecomposeOperators(Pass):
    """Replaces nodes by what they are made of.

    Args:
        wanted: Which nodes; by default all that this pass knows.
    """

    def __init__(self, wanted: Callable[[ir.Node], bool] = lambda node: True) -> None:
        self.wanted = wanted

    def call(self, model: ir.Model) -> PassResult:
        applied, refused = [], []
        for node in model.graph.all_nodes():
            decompose = _DECOMPOSITIONS.get(node.op_type) if node.domain == "" else None
            if decompose is None or not self.wanted(node):
                continue
            body = _Body(node)
            try:
                result = decompose(body, node)
            except _Cannot as reason:
                refused.append(Refusal(place(node), str(reason)))
                continue
            applied.append(place(node))
            body.replace(result)
        if applied:
            NameFixPass()(model)
        return PassResult(model, bool(applied), tuple(applied), tuple(refused))


class _Cannot(Exception):
    """Why a node stays as it is."""


class _Body:
    """The nodes that take the place of one."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.made: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def __call__(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.many(op, 1, *inputs, **attributes)[0]

    def many(self, op: str, outputs: int, *inputs: ir.Value, **attributes: Any) -> Sequence[ir.Value]:
        name = f"{self.node.name}/{op}_{len(self.made)}"
        made = ir.node(op, list(inputs), attributes, num_outputs=outputs, name=name)
        made.metadata_props.update(self.node.metadata_props)  # reports go on to name the module
        dtype = ir.DataType(attributes["to"]) if op == "Cast" else inputs[-1 if op == "Where" else 0].dtype
        for index, value in enumerate(made.outputs):
            value.name = f"{name}_{index}"
            value.type = None if dtype is None else ir.TensorType(dtype)
        self.made.append(made)
        return made.outputs

    def constant(self, values: Any, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        name = f"{self.node.name}/constant_{len(self.constants)}"
        value = constant(name, np.asarray(values).astype(dtype.numpy()))
        self.constants.append(value)
        return value

    def reshape(self, value: ir.Value, sizes: Sequence[int]) -> ir.Value:
        return self("Reshape", value, self.constant(sizes))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if value.dtype == dtype else self("Cast", value, to=int(dtype))

    def replace(self, result: ir.Value) -> None:
        """Puts the new nodes in the old one's place."""
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        for value in self.constants:
            stem, count = value.name, 0
            while value.name in graph.initializers:
                count += 1
                value.name = f"{stem}_{count}"
            graph.register_initializer(value)
        old = self.node.outputs[0]
        ir.convenience.replace_nodes_and_values(graph, self.node, [self.node], self.made, [old], [result])


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _needed(node: ir.Node, index: int) -> ir.Value:
    value = _input(node, index)
    if value is None:
        raise _Cannot(f"its input {index} is missing")
    return value


def _sizes(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None or not all(isinstance(dim, int) for dim in value.shape):
        raise _Cannot("its sizes are open")
    return tuple(int(dim) for dim in value.shape)  # type: ignore[arg-type]


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise _Cannot("its dtype is unknown")
    return value.dtype


# ---- https://onnx.ai/onnx/operators/onnx__Attention.html ----


def _attention(body: _Body, node: ir.Node) -> ir.Value:
    """softmax(scale Q K^T + mask) V. The scale goes to Q first: products of large FP16 numbers then fit."""
    query, key, value = (_needed(node, index) for index in range(3))
    if any(_input(node, index) is not None for index in (4, 5, 6)):
        raise _Cannot("it reads keys and values of an earlier call")
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise _Cannot("more than its first output is read")
    if node.attributes.get_float("softcap", 0.0):
        raise _Cannot("it has a softcap")
    dtype, flat = _dtype(query), len(_sizes(query)) == 3
    batch, rows = _sizes(query)[0], _sizes(query)[-2]
    if flat:
        query, key, value = (
            _heads(body, tensor, node.attributes.get_int(name, 0))
            for tensor, name in ((query, "q_num_heads"), (key, "kv_num_heads"), (value, "kv_num_heads"))
        )
        heads, kv_heads = (node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads"))
    else:
        heads, kv_heads = _sizes(query)[1], _sizes(key)[1]
    columns = _sizes(_needed(node, 1))[-2]
    width, out_width = (_sizes(_needed(node, index))[-1] // (kv_heads if flat else 1) for index in (1, 2))
    if heads != kv_heads:
        key = _repeated(body, key, (batch, kv_heads, columns, width), heads // kv_heads)
        value = _repeated(body, value, (batch, kv_heads, columns, out_width), heads // kv_heads)
    scale = node.attributes.get_float("scale", 1 / math.sqrt(width))
    scaled = body("Mul", query, body.constant(scale, dtype))
    scores = body("MatMul", scaled, body("Transpose", key, perm=[0, 1, 3, 2]))
    scores = _masked(body, node, scores, (rows, columns), dtype)
    scores = body.cast(scores, ir.DataType(node.attributes.get_int("softmax_precision", int(dtype))))
    weights = body.cast(body("Softmax", scores, axis=-1), dtype)
    result = body("MatMul", weights, value)
    if not flat:
        return result
    return body.reshape(body("Transpose", result, perm=[0, 2, 1, 3]), (batch, rows, heads * out_width))


def _heads(body: _Body, value: ir.Value, heads: int) -> ir.Value:
    """(batch, rows, heads * width) as (batch, heads, rows, width)."""
    batch, rows, width = _sizes(value)
    split = body.reshape(value, (batch, rows, heads, width // heads))
    return body("Transpose", split, perm=[0, 2, 1, 3])


def _repeated(body: _Body, value: ir.Value, sizes: tuple[int, int, int, int], times: int) -> ir.Value:
    """Each head ``times`` times, one after the other, as grouped queries read them."""
    batch, heads, rows, width = sizes
    column = body.reshape(value, (batch, heads, 1, rows, width))
    wide = body("Expand", column, body.constant((batch, heads, times, rows, width)))
    return body.reshape(wide, (batch, heads * times, rows, width))


def _masked(
    body: _Body, node: ir.Node, scores: ir.Value, sizes: tuple[int, int], dtype: ir.DataType
) -> ir.Value:
    # The lowest finite number and not -inf: a row in which all is masked stays finite.
    lowest = body.constant(dtype.min, dtype)
    if node.attributes.get_int("is_causal", 0):
        seen = body.constant(np.tri(*sizes, dtype=bool), ir.DataType.BOOL)
        scores = body("Where", seen, scores, lowest)
    mask = _input(node, 3)
    if mask is None:
        return scores
    if _sizes(mask)[-1] not in (1, sizes[1]):
        raise _Cannot("its mask is narrower than its keys")
    if mask.dtype == ir.DataType.BOOL:
        return body("Where", mask, scores, lowest)
    return body("Add", scores, body.cast(mask, dtype))


# ---- https://onnx.ai/onnx/operators/onnx__GroupNormalization.html ----


def _group_normalization(body: _Body, node: ir.Node) -> ir.Value:
    """A group is a channel of an InstanceNormalization; scale and bias follow, one for each true channel."""
    value, scale, bias = (_needed(node, index) for index in range(3))
    sizes, dtype = _sizes(value), _dtype(value)
    groups = node.attributes.get_int("num_groups", 0)
    if _sizes(scale) != (sizes[1],):
        raise _Cannot("its scale is one a group, as before opset 21")
    normal = body(
        "InstanceNormalization",
        body.reshape(value, (sizes[0], groups, -1)),
        body.constant(np.ones(groups), dtype),
        body.constant(np.zeros(groups), dtype),
        epsilon=node.attributes.get_float("epsilon", 1e-5),
    )
    column = (1, sizes[1], *[1] * (len(sizes) - 2))
    scaled = body("Mul", body.reshape(normal, sizes), body.reshape(scale, column))
    return body("Add", scaled, body.reshape(bias, column))


# ---- https://onnx.ai/onnx/operators/onnx__RMSNormalization.html ----


def _rms_normalization(body: _Body, node: ir.Node) -> ir.Value:
    value, scale = _needed(node, 0), _needed(node, 1)
    dtype, stash = _dtype(value), ir.DataType(node.attributes.get_int("stash_type", 1))
    rank = len(_sizes(value))
    axis = node.attributes.get_int("axis", -1) % rank
    x = body.cast(value, stash)
    mean = body("ReduceMean", body("Mul", x, x), body.constant(list(range(axis, rank))), keepdims=1)
    root = body("Sqrt", body("Add", mean, body.constant(node.attributes.get_float("epsilon", 1e-5), stash)))
    return body("Mul", body.cast(body("Div", x, root), dtype), scale)


# ---- https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html ----


def _rotary_embedding(body: _Body, node: ir.Node) -> ir.Value:
    value, cosine, sine = (_needed(node, index) for index in range(3))
    positions = _input(node, 3)
    flat, sizes = len(_sizes(value)) == 3, _sizes(value)
    x = _heads(body, value, node.attributes.get_int("num_heads", 0)) if flat else value
    width = sizes[-1] // node.attributes.get_int("num_heads", 1) if flat else sizes[-1]
    turned = node.attributes.get_int("rotary_embedding_dim", 0) or width
    rest: ir.Value | None = None
    if turned < width:
        x, rest = body.many("Split", 2, x, body.constant((turned, width - turned)), axis=-1)
    if positions is not None:
        cosine, sine = (body("Gather", table, positions) for table in (cosine, sine))
    cosine, sine = (body("Unsqueeze", table, body.constant([1])) for table in (cosine, sine))
    pairs = bool(node.attributes.get_int("interleaved", 0))
    half = turned // 2
    if pairs:
        in_pairs = body.reshape(x, (0, 0, 0, half, 2))
        columns = body.many("Split", 2, in_pairs, body.constant((1, 1)), axis=-1)
        first, second = (body("Squeeze", column, body.constant([-1])) for column in columns)
    else:
        first, second = body.many("Split", 2, x, body.constant((half, half)), axis=-1)
    real = body("Sub", body("Mul", cosine, first), body("Mul", sine, second))
    imaginary = body("Add", body("Mul", sine, first), body("Mul", cosine, second))
    if pairs:
        columns = [body("Unsqueeze", part, body.constant([-1])) for part in (real, imaginary)]
        result = body.reshape(body("Concat", *columns, axis=-1), (0, 0, 0, turned))
    else:
        result = body("Concat", real, imaginary, axis=-1)
    if rest is not None:
        result = body("Concat", result, rest, axis=-1)
    return body.reshape(body("Transpose", result, perm=[0, 2, 1, 3]), sizes) if flat else result


# ---- https://onnx.ai/onnx/operators/onnx__Gelu.html ----


def _gelu(body: _Body, node: ir.Node) -> ir.Value:
    x = _needed(node, 0)
    dtype = _dtype(x)
    if node.attributes.get_string("approximate", "none") == "tanh":
        cube = body("Mul", body("Mul", x, x), body("Mul", x, body.constant(0.044715, dtype)))
        inner = body("Mul", body("Add", x, cube), body.constant(math.sqrt(2 / math.pi), dtype))
        bent = body("Tanh", inner)
    else:
        bent = body("Erf", body("Mul", x, body.constant(math.sqrt(0.5), dtype)))
    gate = body("Add", bent, body.constant(1.0, dtype))
    return body("Mul", body("Mul", x, body.constant(0.5, dtype)), gate)


_DECOMPOSITIONS: Mapping[str, Callable[[_Body, ir.Node], ir.Value]] = {
    "Attention": _attention,
    "GroupNormalization": _group_normalization,
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
    "Gelu": _gelu,
}
