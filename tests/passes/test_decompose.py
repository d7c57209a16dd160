"""DecomposeOperators: each operator against ONNX Runtime's own kernel; refusals; modules keep their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import feeds_for, run, single, value

from trimtab.passes.decompose import DecomposeOperators
from trimtab.passes.scopes import scopes

Q4, K4, V4 = (2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)
GROUPED = (2, 2, 7, 8)
CASES: dict[str, tuple[str, dict[str, Sequence[int]], Sequence[int], dict[str, Any]]] = {
    "attention": ("Attention", {"q": Q4, "k": K4, "v": V4}, (2, 4, 5, 6), {}),
    "attention-scale": ("Attention", {"q": Q4, "k": K4, "v": V4}, (2, 4, 5, 6), {"scale": 0.7}),
    "attention-causal": ("Attention", {"q": Q4, "k": Q4, "v": Q4}, Q4, {"is_causal": 1}),
    "attention-masked": ("Attention", {"q": Q4, "k": K4, "v": V4, "mask": (5, 7)}, (2, 4, 5, 6), {}),
    "attention-grouped": ("Attention", {"q": Q4, "k": GROUPED, "v": GROUPED}, Q4, {}),
    "attention-flat": (
        "Attention",
        {"q": (2, 5, 32), "k": (2, 7, 32), "v": (2, 7, 32)},
        (2, 5, 32),
        {"q_num_heads": 4, "kv_num_heads": 4},
    ),
    "attention-flat-grouped": (
        "Attention",
        {"q": (2, 5, 32), "k": (2, 7, 16), "v": (2, 7, 16)},
        (2, 5, 32),
        {"q_num_heads": 4, "kv_num_heads": 2},
    ),
    "group-norm": (
        "GroupNormalization",
        {"x": (2, 6, 3, 4), "scale": (6,), "bias": (6,)},
        (2, 6, 3, 4),
        {"num_groups": 3, "epsilon": 1e-3},
    ),
    "rms-norm": ("RMSNormalization", {"x": (2, 5, 8), "scale": (8,)}, (2, 5, 8), {"epsilon": 1e-3}),
    "rms-norm-axes": ("RMSNormalization", {"x": (2, 5, 8), "scale": (5, 8)}, (2, 5, 8), {"axis": 1}),
    "rotary": ("RotaryEmbedding", {"x": Q4, "cos": (2, 5, 4), "sin": (2, 5, 4)}, Q4, {}),
    "rotary-pairs": (
        "RotaryEmbedding",
        {"x": Q4, "cos": (2, 5, 4), "sin": (2, 5, 4)},
        Q4,
        {"interleaved": 1},
    ),
    "rotary-positions": (
        "RotaryEmbedding",
        {"x": Q4, "cos": (9, 4), "sin": (9, 4), "position_ids": (2, 5)},
        Q4,
        {},
    ),
    "rotary-part": (
        "RotaryEmbedding",
        {"x": Q4, "cos": (9, 2), "sin": (9, 2), "position_ids": (2, 5)},
        Q4,
        {"rotary_embedding_dim": 4, "num_heads": 4},
    ),
    "rotary-flat": (
        "RotaryEmbedding",
        {"x": (2, 5, 32), "cos": (2, 5, 4), "sin": (2, 5, 4)},
        (2, 5, 32),
        {"num_heads": 4},
    ),
    "gelu": ("Gelu", {"x": (3, 50)}, (3, 50), {}),
    "gelu-tanh": ("Gelu", {"x": (3, 50)}, (3, 50), {"approximate": "tanh"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_operator_does(case: str) -> None:
    op, shapes, out, attributes = CASES[case]
    graph = single(op, shapes, out, **attributes)
    feeds = feeds_for(graph)
    expected = run(graph, feeds)["y"]

    result = DecomposeOperators()(graph)

    assert result.applied == ("block.0",) and not result.refused
    assert all(node.op_type != op for node in graph.graph)
    assert np.abs(run(graph, feeds)["y"] - expected).max() <= 1e-5
    assert all(scopes(node) == ("block.0",) for node in graph.graph)
    assert not DecomposeOperators()(graph).applied


def test_a_mask_of_booleans_that_hides_a_whole_row_stays_finite() -> None:
    graph = single("Attention", {"q": Q4, "k": K4, "v": V4}, (2, 4, 5, 6))
    mask = value("mask", (5, 7), ir.DataType.BOOL)
    old = graph.graph.node(0)
    node = ir.node("Attention", [*old.inputs, mask], outputs=[value("z", (2, 4, 5, 6))], name="masked")
    graph.graph.inputs.append(mask)
    graph.graph.append(node)
    graph.graph.outputs[:] = node.outputs
    graph.graph.remove(old)
    feeds = feeds_for(graph)
    feeds["mask"][:, 0] = True
    expected = run(graph, feeds)["z"]
    assert DecomposeOperators()(graph).applied
    assert np.abs(run(graph, feeds)["z"] - expected).max() <= 1e-5
    feeds["mask"][2] = False
    assert np.isfinite(run(graph, feeds)["z"]).all()


def test_it_leaves_alone_what_is_not_wanted() -> None:
    graph = single("Gelu", {"x": (3, 5)}, (3, 5))
    result = DecomposeOperators(lambda node: node.op_type != "Gelu")(graph)
    assert not result.applied and not result.refused and graph.graph.node(0).op_type == "Gelu"


@pytest.mark.parametrize(
    ("op", "shapes", "out", "attributes", "reason"),
    [
        ("Attention", {"q": Q4, "k": K4, "v": K4}, Q4, {"softcap": 2.0}, "softcap"),
        ("Attention", {"q": ("n", 4, 5, 8), "k": Q4, "v": Q4}, Q4, {}, "its sizes are open"),
        (
            "GroupNormalization",
            {"x": (2, 6, 3, 4), "scale": (3,), "bias": (3,)},
            (2, 6, 3, 4),
            {"num_groups": 3},
            "one a group",
        ),
    ],
)
def test_it_refuses_with_a_reason(
    op: str, shapes: dict[str, Sequence[int]], out: Sequence[int], attributes: dict[str, Any], reason: str
) -> None:
    graph = single(op, shapes, out, **attributes)
    result = DecomposeOperators()(graph)
    assert not result.applied and graph.graph.node(0).op_type == op
    assert [refusal.where for refusal in result.refused] == ["block.0"]
    assert reason in result.refused[0].reason
