"""Attention by parts: the same numbers, and never more scores at a time than the bound."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from trimtab.passes.propagation import propagate
from trimtab.passes.split_attention import SplitAttention
from trimtab.targets.liveness import Rules, peak

SIZES = {"q": (2, 3, 10, 4), "k": (2, 3, 40, 4), "v": (2, 3, 40, 4)}
SCORES = 4 * 2 * 3 * 10 * 40


def graph(attributes: str = "", mask: str = "") -> ir.Model:
    text = f"""<ir_version: 11, opset_import: ["" : 23]>
    g (float[R,3,T,4] q, float[R,3,K,4] k, float[R,3,K,4] v{mask and f", float[T,K] {mask}"}) => (float[R,3,T,4] y)
    {{ y = Attention{attributes}(q, k, v{mask and f", {mask}"}) }}"""
    return ir.from_onnx_text(text)


def run(model: ir.Model, sizes: dict[str, tuple[int, ...]] = SIZES) -> np.ndarray:
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, arrays)[0]


@pytest.mark.parametrize("parts", [2, 3, 4, 10])
def test_the_result_is_the_same_and_the_scores_of_a_part_stay_below_the_bound(parts: int) -> None:
    model = graph("<scale = 0.3>")
    whole = run(model)
    bound = -(-SCORES // parts)
    result = SplitAttention(SIZES, bound)(model)
    assert len(result.applied) == 1 and not result.refused
    assert np.abs(run(model) - whole).max() <= 1e-6
    for node in model.graph:
        if node.op_type == "Attention":
            query = propagate(model, SIZES)[node.inputs[0]]
            assert 0 < 4 * 2 * 3 * query.shape[2] * 40 <= max(bound, SCORES // 10)
    held = [peak(m, propagate(m, SIZES), Rules()).bytes for m in (graph(), model)]
    assert held[1] < held[0]


@pytest.mark.parametrize("queries", [1, 3, 7, 8, 9, 100])
def test_other_sizes_of_picture_give_the_same_too(queries: int) -> None:
    sizes = SIZES | {"q": (2, 3, queries, 4)}
    model = graph()
    whole = run(model, sizes)
    assert SplitAttention(SIZES, SCORES // 8)(model).modified
    ours = run(model, sizes)
    assert ours.shape == whole.shape and np.abs(ours - whole).max() <= 1e-6


def test_it_is_done_once_and_only_where_it_saves_something() -> None:
    model = graph()
    assert not SplitAttention(SIZES, SCORES)(model).modified
    assert SplitAttention(SIZES, SCORES // 2)(model).modified
    assert not SplitAttention(SIZES, SCORES // 2)(model).modified


@pytest.mark.parametrize(("attributes", "mask"), [("<is_causal = 1>", ""), ("", "m")])
def test_queries_that_are_not_alike_are_left_alone(attributes: str, mask: str) -> None:
    result = SplitAttention(SIZES | ({mask: (10, 40)} if mask else {}), 1)(graph(attributes, mask))
    assert not result.modified
    assert [refusal.reason for refusal in result.refused] == ["its queries are masked, or follow others"]


def test_attention_whose_scores_leave_the_graph_stays_whole() -> None:
    text = """<ir_version: 11, opset_import: ["" : 23]>
    g (float[R,3,T,4] q, float[R,3,K,4] k, float[R,3,K,4] v) => (float[R,3,T,4] y, float[R,3,T,K] scores)
    <float[R,3,K,4] keys, float[R,3,K,4] values> { y, keys, values, scores = Attention(q, k, v) }"""
    result = SplitAttention(SIZES, 1)(ir.from_onnx_text(text))
    assert not result.modified
    assert [refusal.reason for refusal in result.refused] == ["its scores or caches are read"]
