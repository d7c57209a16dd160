"""Window attention against dense attention under a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from trimtab.errors import PassError
from trimtab.passes.alternatives import Alternatives
from trimtab.passes.window_attention import SHIFTS, window_attention

ROWS, HEADS, WIDTH = 2, 3, 4


def graph(masked: bool = False) -> ir.Model:
    """One Attention with open tokens, and the inputs that its windows read."""
    float_, int_ = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
    qkv = [ir.Value(name=name, shape=ir.Shape([ROWS, HEADS, "tokens", WIDTH]), type=float_) for name in "qkv"]
    extra = [ir.Value(name="mask", shape=ir.Shape(["tokens", "tokens"]), type=float_)] if masked else []
    node = ir.node("Attention", [*qkv, *extra], name="attention")
    output = node.outputs[0]
    output.name, output.type, output.shape = "out", float_, ir.Shape([ROWS, HEADS, "tokens", WIDTH])
    result = ir.node("Identity", [output], name="end")
    end = result.outputs[0]
    end.name, end.type, end.shape = "end", float_, output.shape
    steer = [
        ir.Value(name="rows", shape=ir.Shape(["height"]), type=int_),
        ir.Value(name="columns", shape=ir.Shape(["width"]), type=int_),
        ir.Value(name="windows", shape=ir.Shape([]), type=int_),
        ir.Value(name="shift", shape=ir.Shape([]), type=int_),
    ]
    first = ir.node("Identity", [steer[0]], name="start")
    first.outputs[0].name, first.outputs[0].type, first.outputs[0].shape = "started", int_, steer[0].shape
    return ir.Model(
        ir.Graph([*qkv, *extra, *steer], [end], nodes=[first, node, result], opset_imports={"": 23}),
        ir_version=10,
    )


def rewritten() -> ir.Model:
    model = graph()
    values = {v.name: v for v in model.graph.inputs}
    start, attention = model.graph.node("start"), model.graph.node("attention")
    window_attention(
        Alternatives(model.graph, start, "test"),
        attention,
        (values["rows"], values["columns"]),
        values["windows"],
        values["shift"],
    )
    return model


def run(model: ir.Model, feeds: dict[str, Any]) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["end"], {i.name: feeds[i.name] for i in session.get_inputs()})[0]


def feeds(height: int, width: int, windows: int, shift: int) -> dict[str, Any]:
    rng = np.random.default_rng(height * width + shift)
    shape = (ROWS, HEADS, height * width, WIDTH)
    return {
        **{name: rng.standard_normal(shape).astype(np.float32) for name in "qkv"},
        "rows": np.arange(height),
        "columns": np.arange(width),
        "windows": np.array(windows),
        "shift": np.array(shift),
    }


def dense(height: int, width: int, shift: int, values: dict[str, Any]) -> np.ndarray:
    """Attention in float64 in which a token sees those of its window: both rolled by the shift, cut in halves."""
    half_h, half_w = height // 2, width // 2
    y, x = np.divmod(np.arange(height * width), width)
    window_y = (y - shift * (half_h // SHIFTS)) % height // half_h
    window_x = (x - shift * (half_w // SHIFTS)) % width // half_w
    window = 2 * window_y + window_x
    q, k, v = (values[name].astype(np.float64) for name in "qkv")
    scores = np.where(window[:, None] == window[None], q @ k.swapaxes(2, 3) / np.sqrt(WIDTH), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("shift", range(SHIFTS))
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8), (6, 20)])
def test_windows_equal_dense_attention_under_a_mask(height: int, width: int, shift: int) -> None:
    values = feeds(height, width, 2, shift)
    np.testing.assert_allclose(
        run(rewritten(), values), dense(height, width, shift, values), rtol=0, atol=1e-5
    )


def test_one_window_is_the_attention_bit_for_bit() -> None:
    for height, width in ((8, 8), (5, 7)):  # and then any size will do
        values = feeds(height, width, 1, 3)
        np.testing.assert_array_equal(run(rewritten(), values), run(graph(), values))


def test_masked_attention_is_refused() -> None:
    model = graph(masked=True)
    values = {v.name: v for v in model.graph.inputs}
    with pytest.raises(PassError, match="neither mask nor cache"):
        window_attention(
            Alternatives(model.graph, model.graph.node("start"), "test"),
            model.graph.node("attention"),
            (values["rows"], values["columns"]),
            values["windows"],
            values["shift"],
        )
