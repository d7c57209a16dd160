"""The lowering to the plugins: computes what the graph computed, and leaves what no kernel can take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

pytest.importorskip("triton")

from trimtab.passes import vq_op
from trimtab.program import Segment
from trimtab.storage import GRAPHS
from trimtab.targets.device import find_device
from trimtab.targets.engines import _Maker
from trimtab.targets.operators import RTX
from trimtab.targets.plugins.aot import matmul_kernels
from trimtab.targets.plugins.embed import embedded
from trimtab.targets.plugins.lower import UseKernels
from trimtab.targets.tensorrt import TensorRTBuilder
from trimtab.weights import WeightStore

HALF = ir.DataType.FLOAT16


def rows_of(codes: np.ndarray, codebook: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Weights (O, columns) of packed rows of bytes: bit by bit, one codeword after the other."""
    stream = np.unpackbits(codes.view(np.uint8), axis=1, bitorder="little")
    count = -(-columns // codebook.shape[1])
    index = stream[:, : count * bits].reshape(len(codes), count, bits) @ (1 << np.arange(bits))
    return codebook[index].reshape(len(codes), -1)[:, :columns]


class VQDequantize(OpRun):
    op_domain = "trimtab"

    def _run(
        self, codes: Any, codebook: Any, scale: Any = None, shape: Any = None, index_bits: int = 8
    ) -> Any:
        rows = rows_of(codes, codebook, index_bits, int(np.prod(shape[1:])))
        scaled = rows if scale is None else (rows * scale[:, None]).astype(rows.dtype)
        return (scaled.reshape(shape),)


class TrimtabVQMatMul1(OpRun):
    op_domain = "trimtab"

    def _run(self, x: Any, words: Any, codebook: Any, scale: Any, bias: Any, **attributes: Any) -> Any:
        assert attributes["plugin_namespace"] == "trimtab" and attributes["plugin_version"] == "1"
        bits = {256: 8, 64: 6}[len(codebook)]
        w = rows_of(words, codebook, bits, x.shape[-1]).astype(np.float32)
        return (((x.astype(np.float32) @ w.T) * scale + bias).astype(x.dtype),)


class TrimtabVQDecode1(OpRun):
    op_domain = "trimtab"

    def _run(self, words: Any, codebook: Any, scale: Any, shape: Any = None, **attributes: Any) -> Any:
        taps, d = int(np.prod(shape[2:])), codebook.shape[1]
        rows = rows_of(words, codebook, {256: 8, 64: 6}[len(codebook)], int(np.prod(shape[1:])))
        scaled = (rows * scale[:, None]).astype(codebook.dtype)
        if shape[1] % d:
            return (scaled.reshape(shape[0], taps, shape[1]).swapaxes(1, 2).reshape(shape),)
        return (scaled.reshape(shape[0], -1, taps, d).swapaxes(2, 3).reshape(shape),)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    del proto.functions[:]
    session = ReferenceEvaluator(proto, new_ops=[VQDequantize, TrimtabVQMatMul1, TrimtabVQDecode1])
    return session.run(None, {"x": x})[0]


class Sample:
    """A graph of one packed weight, as the pass that packs weights leaves it."""

    def __init__(self, x: tuple[Any, ...], shape: tuple[int, ...], *, bits: int = 8, d: int = 4, k: int = 256,
                 scaled: bool = False, dtype: ir.DataType = HALF) -> None:  # fmt: skip
        self.random = np.random.default_rng(0)
        count = -(-int(np.prod(shape[1:])) // d)
        stored = self.random.integers(0, k, (shape[0], count), dtype=np.uint8)
        if bits == 6:
            flat = np.unpackbits(stored[..., None], axis=2, bitorder="little")[..., :6].reshape(shape[0], -1)
            width = -(-count // 4) * 24
            stored = np.packbits(
                np.pad(flat, ((0, 0), (0, width - flat.shape[1]))), axis=1, bitorder="little"
            )
        self.x = ir.Value(name="x", shape=ir.Shape(x), type=ir.TensorType(dtype))
        self.dtype, self.nodes, self.constants = dtype, [], []
        inputs = [self.constant("codes", stored), self.constant("codebook", self.normal(k, d))]
        if scaled:
            inputs.append(self.constant("scale", self.normal(shape[0])))
        attributes = {"shape": list(shape), "index_bits": bits}
        self.weight = self.node(
            "VQDequantize", inputs, attributes, shape, domain="trimtab", name="layer.weight"
        )

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape).astype(self.dtype.numpy())

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.constants.append(value)
        return value

    def node(
        self, op: str, inputs: list[ir.Value], attributes: dict[str, Any], shape: Any, **more: Any
    ) -> ir.Value:
        made = ir.node(op, inputs, attributes, **more)
        made.outputs[0].name = f"v{len(self.nodes)}"
        made.outputs[0].shape, made.outputs[0].type = ir.Shape(shape), ir.TensorType(self.dtype)
        self.nodes.append(made)
        return made.outputs[0]

    def model(self, out: ir.Value) -> ir.Model:
        opsets = {"": 20, "trimtab": 1}
        graph = ir.Graph(
            [self.x], [out], nodes=self.nodes, initializers=self.constants, opset_imports=opsets, name="g"
        )
        return ir.Model(graph, ir_version=10)


def matmul(bias: bool = True, rows: Any = 6, **options: Any) -> ir.Model:
    sample = Sample((2, rows, 22), (20, 22), **options)
    turned = sample.node("Transpose", [sample.weight], {"perm": [1, 0]}, (22, 20))
    y = sample.node("MatMul", [sample.x, turned], {}, (2, rows, 20))
    if bias:
        y = sample.node("Add", [sample.constant("bias", sample.normal(20)), y], {}, (2, rows, 20))
    return sample.model(y)


def gemm(**attributes: Any) -> ir.Model:
    sample = Sample((12, 22), (20, 22))
    inputs = [sample.x, sample.weight, sample.constant("bias", sample.normal(20))]
    return sample.model(sample.node("Gemm", inputs, {"transB": 1, **attributes}, (12, 20)))


def conv(kernel: tuple[int, int], group: int = 1, channels: int = 10, **options: Any) -> ir.Model:
    each = channels // group
    stored = (8, *kernel, each) if kernel != (1, 1) else (8, each, 1, 1)
    sample = Sample((1, channels, 7, 7), stored, **options)
    weight = sample.weight
    if kernel != (1, 1):
        weight = sample.node("Transpose", [weight], {"perm": [0, 3, 1, 2]}, (8, each, *kernel))
    size = (1, 8, 8 - kernel[0], 8 - kernel[1])
    return sample.model(sample.node("Conv", [sample.x, weight], {"group": group}, size))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def lowered(model: ir.Model) -> tuple[np.ndarray, np.ndarray]:
    """What the graph computed before, and what it computes after."""
    x = (
        np.random.default_rng(1)
        .standard_normal([int(d) for d in model.graph.inputs[0].shape])
        .astype(np.float16)
    )
    before = run(model, x)
    result = UseKernels(87)(model)
    assert result.applied == ("layer.weight",) and not result.refused
    onnx.checker.check_model(ir.to_proto(model))
    return before, run(model, x)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"scaled": True}, {"bits": 6, "d": 2, "k": 64}, {"d": 2}, {"k": 30}],
    ids=["bias", "no bias", "scales", "six bits", "two a codeword", "few codewords"],
)
def test_a_matmul_and_its_bias_become_one_product(options: dict[str, Any]) -> None:
    model = matmul(**options)
    before, after = lowered(model)
    assert operators(model) == ["TrimtabVQMatMul1"]
    # The graph rounds the product, the scale and the sum to 16 bits each; the kernel once.
    np.testing.assert_allclose(after, before, atol=2.0**-9 * np.abs(before).max())


def test_a_product_of_many_rows_reads_a_decoded_weight_as_it_lies() -> None:
    model = matmul(rows=600)
    before, after = lowered(model)
    assert operators(model) == ["TrimtabVQDecode1", "Reshape", "Gemm", "Reshape", "Add"]
    assert after.shape == (2, 600, 20)
    np.testing.assert_allclose(after, before, atol=2.0**-9 * np.abs(before).max())


def test_a_gemm_becomes_one_product() -> None:
    model = gemm()
    before, after = lowered(model)
    assert operators(model) == ["TrimtabVQMatMul1"]
    np.testing.assert_allclose(after, before, atol=2.0**-9 * np.abs(before).max())


@pytest.mark.parametrize("options", [{}, {"bits": 6, "d": 2, "k": 64}], ids=["eight bits", "six bits"])
@pytest.mark.parametrize("channels", [10, 16])
@pytest.mark.parametrize(("kernel", "group"), [((3, 3), 1), ((3, 3), 2), ((1, 1), 1), ((1, 3), 1)])
def test_a_convolution_reads_a_decoded_weight(
    kernel: tuple[int, int], group: int, channels: int, options: dict[str, Any]
) -> None:
    model = conv(kernel, group, channels, **options)
    before, after = lowered(model)
    assert operators(model) == ["TrimtabVQDecode1", "Conv"]
    np.testing.assert_array_equal(after, before)


def test_a_kernel_along_one_axis_with_one_channel_each_is_decoded_once() -> None:
    model = conv((3, 1), group=8, channels=8)
    before, after = lowered(model)
    assert operators(model) == ["TrimtabVQDecode1", "Conv"]
    np.testing.assert_array_equal(after, before)


def test_a_product_of_a_vector_reads_a_decoded_weight() -> None:
    sample = Sample((22,), (20, 22))
    turned = sample.node("Transpose", [sample.weight], {"perm": [1, 0]}, (22, 20))
    model = sample.model(sample.node("MatMul", [sample.x, turned], {}, (20,)))
    before, after = lowered(model)
    assert operators(model) == ["TrimtabVQDecode1", "Transpose", "MatMul"]
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(("n", "bias", "size"), [(20, (1, 1, 20), (1, 12, 20)), (1, (), (12, 1))])
def test_what_is_added_and_is_no_bias_stays(n: int, bias: tuple[int, ...], size: tuple[int, ...]) -> None:
    sample = Sample((12, 22), (n, 22))
    turned = sample.node("Transpose", [sample.weight], {"perm": [1, 0]}, (22, n))
    y = sample.node("MatMul", [sample.x, turned], {}, (12, n))
    model = sample.model(sample.node("Add", [y, sample.constant("b", sample.normal(*bias))], {}, size))
    before, after = lowered(model)
    assert operators(model) == ["TrimtabVQMatMul1", "Add"] and after.shape == size
    np.testing.assert_allclose(after, before, atol=2.0**-9 * np.abs(before).max())


@pytest.mark.parametrize("model", [gemm(alpha=0.5), matmul(rows="tokens")], ids=["factor", "open rows"])
def test_what_cannot_be_fused_reads_a_decoded_weight(model: ir.Model) -> None:
    UseKernels(87)(model)
    assert operators(model)[0] == "TrimtabVQDecode1" and "VQDequantize" not in operators(model)


def test_the_kernels_are_those_for_the_rows_and_the_type() -> None:
    model = matmul()
    UseKernels(87)(model)
    (node,) = model.graph
    kernels = embedded(model, node)
    n, k = node.inputs[1].shape[0], node.inputs[0].shape[-1]
    assert kernels == matmul_kernels(87, 12, n, k)  # 2 x 6 rows
    assert {kernel.dtype for kernel in kernels} == {"fp16"}
    assert {value.dtype.name for value in node.inputs[1:]} == {"INT32", "FLOAT16", "FLOAT"}


def test_a_weight_that_computes_in_32_bits_stays_and_says_why() -> None:
    model = matmul(dtype=ir.DataType.FLOAT)
    result = UseKernels(87)(model)
    assert operators(model)[0] == "VQDequantize" and not result.applied
    assert result.refused[0].reason == "its weight is FLOAT, and kernels take FP16 and BF16"


def test_weights_in_32_bits_beside_the_plugins_leave_a_whole_graph() -> None:
    sample = Sample((6, 22), (20, 22))
    turned = sample.node("Transpose", [sample.weight], {"perm": [1, 0]}, (22, 20))
    narrow = sample.node("MatMul", [sample.x, turned], {}, (6, 20))
    sample.dtype = ir.DataType.FLOAT
    wide = sample.node("Cast", [narrow], {"to": sample.dtype}, (6, 20))
    codes = sample.constant("wide.codes", sample.random.integers(0, 256, (20, 5), dtype=np.uint8))
    inputs = [codes, sample.constant("wide.codebook", sample.normal(256, 4))]
    attributes = {"shape": [20, 20], "index_bits": 8}
    weight = sample.node("VQDequantize", inputs, attributes, (20, 20), domain="trimtab", name="wide.weight")
    model = sample.model(sample.node("Gemm", [wide, weight], {"transB": 1}, (6, 20)))
    made = TensorRTBuilder().lower(model, find_device("orin-nano-8gb"))
    assert {"TrimtabVQMatMul1", "DequantizeLinear"} <= set(operators(made))
    onnx.checker.check_model(ir.to_proto(made))


def test_a_second_run_finds_nothing_left() -> None:
    model = matmul()
    assert UseKernels(87)(model).modified
    assert not UseKernels(87)(model).modified


def test_for_a_jetson_the_builder_lowers_to_the_plugins_and_desktop_cards_have_none() -> None:
    model = matmul()
    packed = next(node for node in model.graph if vq_op.is_packed(node))
    model.functions[packed.op_identifier()] = vq_op.function(packed.overload, model.opset_imports[""])
    made = TensorRTBuilder().lower(model, find_device("orin-nano-8gb"))
    assert operators(made) == ["TrimtabVQMatMul1"]
    assert model.functions and not made.functions
    onnx.checker.check_model(ir.to_proto(made))
    assert "VQDequantize" in operators(model)  # stays as it was
    assert not RTX.plugins


def test_chips_that_share_a_parser_have_kernels_of_their_own(tmp_path: Path) -> None:
    orin = find_device("orin-nano-8gb")
    devices = [orin, find_device("orin-nx-8gb"), dataclasses.replace(orin, name="other", sm="8.6")]
    (tmp_path / GRAPHS).mkdir()
    maker = _Maker(WeightStore(tmp_path / GRAPHS), tmp_path, None, lambda text: None)
    made = list(maker.fixed(Segment("denoiser", matmul()), devices, {"x": (2, 6, 22)}, ""))
    assert [engine.sm for engine in made] == ["8.7", "8.7", "8.6"] and made[0].path == made[1].path
    for engine in made:
        model = ir.load(tmp_path / engine.path)
        (node,) = model.graph
        target = f".target sm_{str(engine.sm).replace('.', '')}\n"
        assert all(target in kernel.ptx for kernel in embedded(model, node))
