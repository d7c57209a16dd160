"""FP16 and BF16 as a rewrite: what changes, what stays in float32, and how far results move."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from trimtab.passes.precision import SCORES, ConvertPrecision, convert

HALF, BRAIN, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT
RNG = np.random.default_rng(0)


def graph(text: str, functions: str = "", domains: str = "", **weights: np.ndarray) -> ir.Model:
    """A graph from ONNX's text form, with weights by name and all types inferred."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23{domains}]>\n{text}\n{functions}')
    for name, array in weights.items():
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        model.graph.register_initializer(value)
        for node in model.graph.all_nodes():
            for index, old in enumerate(node.inputs):
                if old is not None and old.name == name:
                    node.replace_input_with(index, value)
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)


def check(model: ir.Model) -> None:
    """Every type fits every operator, by the standard's own checker."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    values = [value for node in model.graph for value in node.outputs]
    return {str(value.name): value.dtype for value in (*values, *model.graph.initializers.values())}


def casts(model: ir.Model) -> int:
    return Counter(node.op_type for node in model.graph)["Cast"]


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


MLP = """
agraph (float[n, 32] x) => (float[n, 8] y) {
    a = MatMul (x, w1)
    b = Add (a, bias)
    c = Relu (b)
    y = MatMul (c, w2)
}
"""


def mlp(scale: float = 1.0) -> ir.Model:
    weights = {"w1": normal(32, 64) * scale, "bias": normal(64), "w2": normal(64, 8)}
    return graph(MLP, **{name: array.astype(np.float32) for name, array in weights.items()})


def test_weights_and_activations_change_and_the_interface_does_not() -> None:
    model = mlp()
    result = convert(model, "fp16", {})
    check(result.model)
    assert types(result.model) | {"y": FLOAT} == dict.fromkeys(types(result.model), HALF) | {"y": FLOAT}
    assert casts(result.model) == 2 and len(result.applied) == 4 and not result.refused
    (x,) = (normal(5, 32),)
    (ours,), (theirs,) = run(result.model, x=x), run(model, x=x)
    assert ours.dtype == np.float32
    # Four roundings of at most 2**-11 each, on sums whose terms do not all cancel.
    assert 0 < np.linalg.norm(ours - theirs) < 4 * 2**-11 * np.linalg.norm(theirs)


def test_the_model_that_is_converted_stays_as_it_was() -> None:
    model = mlp()
    before = types(model)
    convert(model, "bf16")
    assert types(model) == before and casts(model) == 0


def test_bf16_needs_no_ranges_and_gives_a_graph_of_correct_types() -> None:
    result = convert(mlp(), "bf16")
    check(result.model)
    assert types(result.model)["w1"] == BRAIN


def test_a_second_conversion_changes_nothing() -> None:
    once = convert(mlp(), "fp16", {}).model
    twice = convert(once, "fp16", {})
    assert not twice.modified and types(twice.model) == types(once)
    assert "half precision already" in twice.refused[0].reason


def test_graphs_that_cannot_be_converted_are_left_alone_with_a_reason() -> None:
    assert "ranges were not measured" in ConvertPrecision("fp16", None)(mlp()).refused[0].reason
    light = graph("agraph (float[n, 4] x) => (float[n, 4] y) { y = Mul (x, x) }")
    assert "nothing to gain" in convert(light, "fp16", {}).refused[0].reason
    untyped = mlp()
    next(iter(untyped.graph)).outputs[0].type = None
    assert "type of a is not known" in convert(untyped, "fp16", {}).refused[0].reason


def test_a_layer_that_overflows_stays_in_float32_and_is_named() -> None:
    model = mlp()
    result = convert(model, "fp16", {"a": 40000.0, "b": 100.0, "y": 3.0})
    check(result.model)
    kept = {refusal.where: refusal.reason for refusal in result.refused}
    assert set(kept) == {"a", "b"}  # what makes it and what reads it
    assert "a reaches 4e+04" in kept["a"] and "ends at 65504" in kept["a"]
    found = types(result.model)
    assert (found["a"], found["b"], found["w1"], found["bias"], found["w2"]) == (
        FLOAT,
        FLOAT,
        FLOAT,
        FLOAT,
        HALF,
    )
    assert not convert(model, "fp16", {"a": 4000.0}).refused  # sixteen times that is still below 65504


def test_an_overflow_is_followed_through_what_only_moves() -> None:
    text = """
    agraph (float[2, 8] x) => (float[2, 8] y) <int64[2] flat = {2, 8}> {
        a = MatMul (x, w)
        b = Transpose <perm = [1, 0]> (a)
        c = Reshape (b, flat)
        y = MatMul (c, w)
    }
    """
    result = convert(graph(text, w=normal(8, 8)), "fp16", {"a": 1e6})
    assert {refusal.where for refusal in result.refused} == {"a", "b", "c", "y"} and not result.applied


def test_a_mask_s_fill_is_no_overflow_and_stays_finite() -> None:
    text = """
    agraph (float[1, 1, 4, 8] q, bool[1, 1, 4, 4] allowed) => (float[1, 1, 4, 8] y) <float zero = {0}> {
        mask = Where (allowed, zero, least)
        y = Attention (q, q, q, mask)
    }
    """
    model = graph(text, least=np.array(np.finfo(np.float32).min, np.float32))
    result = convert(model, "fp16", {"mask": float(np.finfo(np.float32).max), "y": 3.0})
    assert not result.refused
    q, allowed = normal(1, 1, 4, 8), np.tril(np.ones((1, 1, 4, 4), bool))
    allowed[..., 0, :] = False  # a row without anything to look at: minus infinity there is NaN
    (ours,), (theirs,) = run(result.model, q=q, allowed=allowed), run(model, q=q, allowed=allowed)
    np.testing.assert_allclose(ours, theirs, atol=4e-3)


def test_what_is_made_of_a_mask_alone_needs_no_margin() -> None:
    text = """
    agraph (float[1, 1, 4, 8] q, float[4, 4] attention_mask) => (float[1, 1, 4, 8] y)
        <float one = {1}, float far = {-10000}, int64[4] sizes = {1, 1, 4, 4}> {
        without = Sub (one, attention_mask)
        bias = Mul (without, far)
        mask = Reshape (bias, sizes)
        y = Attention (q, q, q, mask)
    }
    """
    model = graph(text)
    ranges = {"without": 1.0, "bias": 1e4, "y": 3.0}
    result = convert(model, "fp16", ranges)
    assert not result.refused and types(result.model)["bias"] == HALF
    q, mask = normal(1, 1, 4, 8), np.tile(np.array([1, 1, 0, 1], np.float32), (4, 1))
    feeds = {"q": q, "attention_mask": mask}
    np.testing.assert_allclose(*(run(m, **feeds)[0] for m in (result.model, model)), atol=4e-3)

    assert convert(model, "fp16", ranges | {"bias": 1e5}).refused  # beyond the type with no margin at all
    other = graph(text.replace("attention_mask", "tokens"))
    assert {refusal.where for refusal in convert(other, "fp16", ranges).refused} == {"bias", "mask", "y"}


def test_an_attention_whose_scores_overflow_stays_in_float32() -> None:
    text = "agraph (float[1, 1, 4, 8] q) => (float[1, 1, 4, 8] y) { y = Attention (q, q, q) }"
    (refusal,) = convert(graph(text), "fp16", {"y": 1.0, f"y{SCORES}": 3e4}).refused
    assert refusal.where == "y" and refusal.reason.startswith("a score reaches 3e+04")


@pytest.mark.parametrize(("scale", "why"), [(1e5, "reaches"), (1e-7, "too small")])
def test_a_weight_that_fp16_cannot_hold_stays_in_float32(scale: float, why: str) -> None:
    result = convert(mlp(scale), "fp16", {})
    assert [(r.where, why in r.reason) for r in result.refused] == [("a", True)]
    assert types(result.model)["w1"] == FLOAT and types(result.model)["w2"] == HALF
    assert not convert(mlp(scale), "bf16").refused


@pytest.mark.parametrize("product", ["Mul (w, h)", "Mul (h, w)", "MatMul (w, h)", "Div (w, h)"])
def test_a_small_factor_stays_in_float32_on_either_side(product: str) -> None:
    text = (
        f"agraph (float[8, 8] x) => (float[8, 8] y) {{ h = MatMul (x, v) a = {product} y = MatMul (a, v) }}"
    )
    (refusal,) = convert(graph(text, w=1e-7 * normal(8, 8), v=normal(8, 8)), "fp16", {}).refused
    assert refusal.where == "a" and "too small" in refusal.reason


def test_angles_of_time_steps_are_computed_in_float32() -> None:
    text = """
    agraph (float[1] timestep) => (float[1, 8] y) <int64[2] one = {1, -1}> {
        angles = Mul (timestep, frequencies)
        sines = Sin (angles)
        cosines = Cos (angles)
        both = Concat <axis = 0> (sines, cosines)
        row = Reshape (both, one)
        y = MatMul (row, w)
    }
    """
    model = graph(text, frequencies=np.geomspace(1, 1e-4, 8).astype(np.float32), w=normal(16, 8))
    result = convert(model, "fp16", {})
    check(result.model)
    found = types(result.model)
    assert [found[n] for n in ("angles", "sines", "cosines", "frequencies")] == [FLOAT] * 4
    assert (found["both"], found["w"]) == (HALF, HALF) and not result.refused
    step = np.array([987.0], np.float32)
    (ours,), (theirs,) = run(result.model, timestep=step), run(model, timestep=step)
    assert np.linalg.norm(ours - theirs) < 2**-9 * np.linalg.norm(theirs)


def test_statistics_of_a_norm_that_is_spelled_out_are_float32() -> None:
    text = """
    agraph (float[n, 32] x) => (float[n, 8] y) <float two = {2}, float epsilon = {1e-12}, int64[1] last = {-1}> {
        h = MatMul (x, w1)
        mean = ReduceMean (h, last)
        centred = Sub (h, mean)
        square = Pow (centred, two)
        variance = ReduceMean (square, last)
        safe = Add (variance, epsilon)
        deviation = Sqrt (safe)
        z = Div (centred, deviation)
        y = MatMul (z, w2)
    }
    """
    model = graph(text, w1=normal(32, 64) * 100, w2=normal(64, 8))
    result = convert(model, "fp16", {})
    check(result.model)
    found = types(result.model)
    assert all(found[n] == FLOAT for n in ("mean", "square", "variance", "safe", "deviation", "epsilon"))
    assert all(found[n] == HALF for n in ("h", "centred", "z", "w1", "w2"))
    x = normal(4, 32)  # squares are about 3e5, beyond FP16
    (ours,), (theirs,) = run(result.model, x=x), run(model, x=x)
    assert np.linalg.norm(ours - theirs) < 2**-8 * np.linalg.norm(theirs)


def test_a_tensor_is_cast_once_for_all_its_readers_and_no_detour_is_taken() -> None:
    text = """
    agraph (float[2, 8] x) => (float[8, 2] turned, float[2, 8] y, float[2, 8] z) {
        turned = Transpose <perm = [1, 0]> (x)
        y = MatMul (x, w)
        z = MatMul (x, w)
    }
    """
    result = convert(graph(text, w=normal(8, 8)), "fp16", {})
    check(result.model)
    assert types(result.model)["turned"] == FLOAT  # between two float32 places
    assert casts(result.model) == 3  # x once, y and z


def test_a_result_that_is_read_inside_as_well_keeps_its_name_outside() -> None:
    text = "agraph (float[2, 8] x) => (float[2, 8] a, float[2, 8] y) { a = MatMul (x, w) y = MatMul (a, w) }"
    model = graph(text, w=normal(8, 8))
    result = convert(model, "fp16", {})
    check(result.model)
    assert [v.name for v in result.model.graph.outputs] == ["a", "y"]
    for ours, theirs in zip(run(result.model, x=normal(2, 8)), run(model, x=normal(2, 8)), strict=True):
        assert ours.dtype == theirs.dtype == np.float32


def test_a_weight_of_both_precisions_is_stored_once_and_a_constant_is_exact_in_each() -> None:
    text = """
    agraph (float[2, 64] x) => (float[2, 64] y, float[1, 64] s) <int64[1] first = {0}> {
        a = MatMul (x, w)
        b = Add (a, tenth)
        y = MatMul (b, w)
        t = ReduceSum (w, first)
        s = Add (t, tenth)
    }
    """
    model = graph(text, w=normal(64, 64), tenth=np.array([0.1], np.float32))
    result = convert(model, "fp16", {})
    check(result.model)
    stored = {str(v.name): v.const_value for v in result.model.graph.initializers.values()}
    assert set(stored) == {"w", "tenth", "tenth.fp16", "first"}
    assert stored["w"].dtype == HALF and stored["tenth"].numpy()[0] == np.float32(0.1)


def test_what_an_operator_wants_in_float32_stays_so() -> None:
    text = """
    agraph (float[1, 4, 8, 8] x) => (float[1, 4, 16, 16] y) {
        a = Conv (x, w)
        y = Resize <mode = "nearest"> (a, , scales)
    }
    """
    model = graph(text, w=normal(4, 4, 1, 1), scales=np.array([1, 1, 2, 2], np.float32))
    result = convert(model, "fp16", {})
    check(result.model)
    assert types(result.model)["scales"] == FLOAT


PACKED = """
agraph (float[n, 8] x) => (float[n, 8] y) {
    w = own.Decode (codes, codebook)
    y = MatMul (x, w)
}
"""
DECODE = """
<domain: "own", opset_import: ["" : 23]>
Decode (codes, codebook) => (w) {
    shape = Constant <value = int64[2] {8, 8}> ()
    indices = Cast <to = 7> (codes)
    rows = Gather (codebook, indices)
    w = Reshape (rows, shape)
}
"""


def packed(body: str = DECODE) -> ir.Model:
    codes, codebook = RNG.integers(0, 16, 16).astype(np.uint8), normal(16, 4)
    model = graph(PACKED, body, ', "own" : 1', codes=codes, codebook=codebook)
    next(iter(model.graph)).outputs[0].type = ir.TensorType(FLOAT)
    return model


def test_packed_weights_keep_their_codes_and_their_codebooks_change() -> None:
    model = packed()
    result = convert(model, "fp16", {})
    assert len(result.model.functions) == 1 and len(result.applied) == 2
    found = types(result.model)
    assert (found["codes"], found["codebook"], found["w"]) == (ir.DataType.UINT8, HALF, HALF)
    x = normal(3, 8)
    (ours,), (theirs,) = run(result.model, x=x), run(model, x=x)
    assert np.linalg.norm(ours - theirs) < 2**-9 * np.linalg.norm(theirs)


def test_a_function_that_names_float32_inside_is_left_as_it_is() -> None:
    body = DECODE.replace("w = Reshape (rows, shape)", "v = Reshape (rows, shape)\n w = Cast <to = 1> (v)")
    result = convert(packed(body), "fp16", {})
    assert types(result.model)["codebook"] == FLOAT and types(result.model)["w.fp16"] == HALF


def test_a_subgraph_goes_on_reading_float32() -> None:
    text = """
    agraph (float[2, 8] x, bool flag) => (float[2, 8] y) {
        a = MatMul (x, w)
        b = MatMul (a, w)
        y = If (flag) <
            then_branch = yes () => (float[2, 8] t) { t = Add (b, b) },
            else_branch = no () => (float[2, 8] e) { e = Identity (b) }
        >
    }
    """
    model = graph(text, w=normal(8, 8))
    result = convert(model, "fp16", {})
    check(result.model)
    x, flag = normal(2, 8), np.array(True)
    (ours,), (theirs,) = run(result.model, x=x, flag=flag), run(model, x=x, flag=flag)
    assert np.linalg.norm(ours - theirs) < 2**-8 * np.linalg.norm(theirs)


def test_large_weights_are_converted_when_they_are_read_and_not_before(tmp_path: Path) -> None:
    result = convert(mlp(), "fp16", {})
    assert isinstance(result.model.graph.initializers["w1"].const_value, ir.LazyTensor)
    ir.save(result.model, tmp_path / "m.onnx", external_data="m.weights")
    stored = ir.load(tmp_path / "m.onnx").graph.initializers["w1"].const_value
    assert stored is not None and stored.nbytes == 32 * 64 * 2
