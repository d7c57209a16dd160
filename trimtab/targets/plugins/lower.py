"""Lowers packed weights to the plugins: a graph that computes in 16 bits, at known sizes, for one SM."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.passes.base import Pass, PassResult, Refusal
from trimtab.passes.constants import add_constant
from trimtab.passes.vq_op import is_packed
from trimtab.targets.plugins.aot import Kernel, decode_kernel, matmul_kernels
from trimtab.targets.plugins.codes import as_words, grouped
from trimtab.targets.plugins.embed import ATTRIBUTE, embed
from trimtab.targets.plugins.qdp import DECODE_OP, MATMUL_OP, NAMESPACE
from trimtab.targets.plugins.tiles import fuses, order

_DTYPES = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


class UseKernels(Pass):
    """Replaces `trimtab::VQDequantize` and its readers by the plugins' operators.

    MatMul and Gemm of few rows (`tiles.fuses`), with a bias that follows, become one fused product. Whatever else reads
    the weight (Conv, a Gemm with factors, a product of many rows) gets it from the decoder, in the order that it wants.
    Products and decoded weights are those of the graph, rounded to 16 bits once.

    Args:
        sm: Of the device, as in sm_87.
    """

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def call(self, model: ir.Model) -> PassResult:
        """Lowers every packed weight that computes in FP16 or BF16; refuses the others, which stay as they are."""
        applied, refused = [], []
        for node in list(model.graph):
            if not is_packed(node):
                continue
            name = node.name or str(node.outputs[0].name)
            weight = _Weight(node)
            if weight.dtype is None:
                refused.append(
                    Refusal(name, f"its weight is {node.outputs[0].dtype}, and kernels take FP16 and BF16")
                )
                continue
            self._lower(model, weight)
            if node.graph is None:
                applied.append(name)
            else:
                refused.append(Refusal(name, "something reads its weight in an order that no kernel writes"))
        if applied:
            model.opset_imports[NAMESPACE] = 1
        return PassResult(model, bool(applied), tuple(applied), tuple(refused))

    def _lower(self, model: ir.Model, weight: _Weight) -> None:
        graph = model.graph
        for value, turned in weight.views():
            for reader, index in list(value.uses()):
                if index == 1 and reader.op_type in ("MatMul", "Gemm") and reader.domain == "":
                    self._product(model, weight, reader, turned)
        _remove_unread(graph, weight)
        for value, _ in reversed(weight.views()):  # W itself last: only what its Transposes do not serve
            if value.uses():
                self._decode(model, weight, value)
        _remove_unread(graph, weight)
        for value in weight.sources:
            if value.name and value.name in graph.initializers and not value.uses():
                del graph.initializers[value.name]

    def _product(self, model: ir.Model, weight: _Weight, reader: ir.Node, turned: bool) -> None:
        graph, x, n = model.graph, reader.inputs[0], weight.shape[0]
        # The plugin takes no vector: a MatMul of one reads the weight decoded.
        rows = None if x is None or x.shape is None or len(x.shape) < 2 else _count(x.shape[:-1])
        if rows is None or len(weight.shape) != 2 or turned != _reads_turned(reader):
            return
        if not fuses(self.sm, rows, n, weight.columns):
            if reader.op_type == "MatMul":
                _as_gemm(graph, weight, reader, rows)
            return
        bias = reader.inputs[2] if len(reader.inputs) > 2 else None
        out = reader.outputs[0]
        if reader.op_type == "Gemm":
            factors = [reader.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
            if factors != [1.0, 1.0] or reader.attributes.get_int("transA", 0) != 0:
                return
            if bias is not None and _vector(bias, n) is None:
                return
        addition = _addition(out, n) if bias is None else None
        if addition is not None:
            out, bias = addition[0].outputs[0], addition[1]
        kernels = matmul_kernels(
            self.sm,
            rows,
            n,
            weight.columns,
            d=weight.d,
            bits=weight.bits,
            dtype=weight.dtype or "",
        )
        stored = np.zeros(n) if bias is None else _vector(bias, n)
        inputs = [x, *weight.operands(graph), weight.constant(graph, f"bias.{out.name}", stored)]
        replaced = [reader] if addition is None else [reader, addition[0]]
        _replace(model, replaced, out, MATMUL_OP, inputs, kernels)

    def _decode(self, model: ir.Model, weight: _Weight, value: ir.Value) -> None:
        producer, shape = value.producer(), weight.shape
        assert producer is not None
        if producer is not weight.node:
            # A convolution's weight comes as (O, kh, kw, I / group) and is turned; the kernel writes it turned.
            last = len(shape) - 1
            if last < 2 or tuple(producer.attributes.get_ints("perm", ())) != (0, last, *range(1, last)):
                return
            shape = (shape[0], shape[last], *shape[1:last])
        elif math.prod(shape[2:]) > 1:
            return  # its Transpose is served
        kernel = decode_kernel(self.sm, shape, d=weight.d, bits=weight.bits, dtype=weight.dtype or "")
        operands = weight.operands(model.graph, shape)
        _replace(model, [producer], value, DECODE_OP, operands, (kernel,), shape)


class _Weight:
    """One node of the operator, in numbers."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.sources = [value for value in node.inputs if value is not None]
        self.codes, self.codebook = (_numbers(value) for value in self.sources[:2])
        self.scale = _numbers(self.sources[2]) if len(self.sources) > 2 else np.ones(len(self.codes))
        self.shape = tuple(node.attributes["shape"].as_ints())
        self.bits = node.attributes.get_int("index_bits", 8)
        self.columns = math.prod(self.shape[1:])
        self.d = self.codebook.shape[1]
        self.type = node.outputs[0].dtype
        self.dtype = None if self.type is None else _DTYPES.get(self.type)

    def views(self) -> list[tuple[ir.Value, bool]]:
        """W, and every Transpose of it."""
        value = self.node.outputs[0]
        turned = [user for user, _ in value.uses() if user.op_type == "Transpose" and user.domain == ""]
        return [(value, False), *((user.outputs[0], True) for user in turned)]

    def operands(self, graph: ir.Graph, decoded: tuple[int, ...] | None = None) -> list[ir.Value]:
        """Words, codebook and scale as the plugins take them; made once.

        Args:
            graph: Where to.
            decoded: The shape of the weight that the decoder writes; None for a product.
        """
        name, stored = "words", self.codes
        if decoded is not None and order(decoded, self.d) == "grouped":
            name, stored = "grouped", grouped(stored, decoded, self.d, self.bits)
        words = self.constant(graph, name, as_words(stored), ir.DataType.INT32)
        rows = np.zeros((1 << self.bits, self.d), np.float32)
        rows[: len(self.codebook)] = self.codebook
        return [
            words,
            self.constant(graph, "codebook", rows),
            self.constant(graph, "scale", self.scale, ir.DataType.FLOAT),
        ]

    def constant(
        self, graph: ir.Graph, name: str, array: npt.NDArray[Any] | None, dtype: ir.DataType | None = None
    ) -> ir.Value:
        """An initializer that is named after the weight; of the weight's type if none is given."""
        assert array is not None
        name = f"{self.node.outputs[0].name}.{name}"
        if name not in graph.initializers:
            add_constant(graph, name, array.astype((dtype or self.type).numpy()))  # type: ignore[union-attr]
        return graph.initializers[name]


def _as_gemm(graph: ir.Graph, weight: _Weight, reader: ir.Node, rows: int) -> None:
    """A MatMul as a Gemm, which reads the weight as it is decoded: nothing has to turn it in memory."""
    x, out = reader.inputs[0], reader.outputs[0]
    assert x is not None and out.shape is not None
    flat = add_constant(graph, f"{out.name}.rows", np.array([rows, weight.columns], np.int64))
    whole = add_constant(graph, f"{out.name}.shape", np.array(out.shape.numpy(), np.int64))
    left = ir.node("Reshape", [x, flat])
    product = ir.node("Gemm", [left.outputs[0], weight.node.outputs[0]], {"transB": 1}, name=reader.name)
    last = ir.node("Reshape", [product.outputs[0], whole])
    sizes = (ir.Shape((rows, weight.columns)), ir.Shape((rows, weight.shape[0])), out.shape)
    for part, node, size in zip(("left", "product", "result"), (left, product, last), sizes, strict=True):
        made = node.outputs[0]
        made.name, made.shape, made.type = f"{out.name}.{part}", size, out.type
        node.metadata_props.update(reader.metadata_props)
    graph.insert_after(reader, [left, product, last])
    out.replace_all_uses_with(last.outputs[0], replace_graph_outputs=True)
    last.outputs[0].name, out.name = out.name, None
    graph.remove(reader, safe=True)


def _remove_unread(graph: ir.Graph, weight: _Weight) -> None:
    """Removes the weight's Transposes that nothing reads, and then the weight."""
    producers = [value.producer() for value, _ in reversed(weight.views())]
    for node in producers:
        if node is not None and node.graph is graph and not any(output.uses() for output in node.outputs):
            graph.remove(node, safe=True)


def _numbers(value: ir.Value) -> npt.NDArray[Any]:
    assert value.const_value is not None, "codes and codebooks are initializers"
    return value.const_value.numpy()


def _count(sizes: Any) -> int | None:
    """How many elements, or None where a size is open."""
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _reads_turned(reader: ir.Node) -> bool:
    """Whether a product reads its weight as (I, O)."""
    return reader.op_type == "MatMul" or not reader.attributes.get_int("transB", 0)


def _vector(value: ir.Value, n: int) -> npt.NDArray[Any] | None:
    """A constant of n numbers along the last axis, or None."""
    tensor = value.const_value
    if tensor is None or tensor.size != n or not len(tensor.shape) or tensor.shape[-1] != n:
        return None
    return tensor.numpy().reshape(-1)


def _addition(value: ir.Value, n: int) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a bias that alone reads a product and leaves its shape, and the bias."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0][0].op_type != "Add" or uses[0][0].domain != "" or value.is_graph_output():
        return None
    node, index = uses[0]
    bias = node.inputs[1 - index]
    if bias is None or _vector(bias, n) is None:
        return None
    assert bias.const_value is not None
    wider = value.shape is None or len(bias.const_value.shape) > len(value.shape)
    return None if wider else (node, bias)


def _replace(
    model: ir.Model,
    nodes: list[ir.Node],
    out: ir.Value,
    op_type: str,
    inputs: list[Any],
    kernels: tuple[Kernel, ...],
    shape: tuple[int, ...] | None = None,
) -> None:
    """Puts a plugin's node in the place of others, the last of which has the result."""
    attributes: dict[str, Any] = {
        ATTRIBUTE: embed(model, kernels),
        "plugin_namespace": NAMESPACE,
        "plugin_version": "1",
    }
    if shape is not None:
        attributes["shape"] = list(shape)
    made = ir.node(op_type, inputs, attributes, domain=NAMESPACE, name=nodes[-1].name)
    made.metadata_props.update(nodes[0].metadata_props)
    result = made.outputs[0]
    result.shape, result.type = out.shape, out.type
    model.graph.insert_after(nodes[-1], made)
    out.replace_all_uses_with(result, replace_graph_outputs=True)
    result.name, out.name = out.name, None
    for node in reversed(nodes):
        if not any(output.uses() for output in node.outputs):
            model.graph.remove(node, safe=True)
