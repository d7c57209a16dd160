"""The plugin-free form of packed weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from packed import graph, node, random_codes, run

from trimtab.passes import vq_op
from trimtab.passes.codebooks import Codebooks
from trimtab.passes.vq import PackWeights
from trimtab.passes.vq_int8 import DecodeFromInt8

CASES = {
    "matmul": ((6, 16), "MatMul", {}, (2, 3, 16)),
    "matmul, six-bit codes filled up to whole bytes": ((6, 10), "MatMul", {}, (2, 3, 10)),
    "gemm, odd channels": ((5, 9), "Gemm", {"transB": 1}, (3, 9)),
    "conv, grouped": ((6, 3, 3, 3), "Conv", {"group": 2}, (1, 6, 5, 4)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("bits", "scaled"), [(2, False), (3, True), (4, False)])
def test_it_decodes_the_same_weights(case: str, bits: int, scaled: bool) -> None:
    shape, op_type, attributes, x_shape = CASES[case]
    packed = random_codes(shape, bits, scaled)
    weight = vq_op.from_rows(packed.rows(), shape)
    stored = np.ascontiguousarray(weight.T if op_type == "MatMul" else weight)
    model = graph({"x": x_shape}, {"w": stored}, node(op_type, "x", "w", **attributes))
    x = np.random.default_rng(1).standard_normal(x_shape).astype(np.float32)
    expected = run(model, x=x)
    PackWeights(Codebooks("", {"w": packed}))(model)
    result = DecodeFromInt8()(model)
    assert result.applied == ("w.decoded",) and not model.functions
    assert all(node.domain == "" for node in model.graph)
    assert model.graph.initializers["w.decoded.int8"].dtype == ir.DataType.INT8
    assert "w.codes" not in model.graph.initializers
    assert np.abs(run(model, fold=False, x=x) - expected).max() <= 1e-6 * np.abs(expected).max()
    assert not DecodeFromInt8()(model).modified


def test_codes_that_are_computed_are_refused() -> None:
    packed = random_codes((6, 16))
    model = graph({"x": (2, 16)}, {"w": packed.rows().T.copy()}, node("MatMul", "x", "w"))
    PackWeights(Codebooks("", {"w": packed}))(model)
    decode = next(n for n in model.graph if vq_op.is_packed(n))
    made = ir.node("Identity", [decode.inputs[0]])
    model.graph.insert_before(decode, made)
    decode.replace_input_with(0, made.outputs[0])
    result = DecodeFromInt8()(model)
    assert not result.modified and model.functions
    assert [r.reason for r in result.refused] == ["its codes are computed and not stored"]
