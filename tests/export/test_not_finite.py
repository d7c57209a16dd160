"""The last nodes of a decoder do not turn a number that is not finite into a colour."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from trimtab.export.encoders import PixelDecoder
from trimtab.export.onnx.adapt import pixel_graph
from trimtab.export.trace import Example, trace


def traced() -> ir.Model:
    """What ends the decoders that are traced."""
    latents = Example(torch.randn(2, 3, 12, 10), ("batch", None, "height", "width"))
    return trace(PixelDecoder(), {"latents": latents}, ["image"])


@pytest.fixture(scope="module", params=[traced, lambda: pixel_graph(3)], ids=["traced", "of .onnx files"])
def graph(request: pytest.FixtureRequest) -> ir.Model:
    model: ir.Model = request.param()
    return model


def run(graph: ir.Model, latents: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"latents": latents})[0])


def test_what_is_finite_is_clipped_exactly(graph: ir.Model) -> None:
    latents = np.random.default_rng(0).normal(0, 2, (1, 3, 8, 8)).astype(np.float32)
    latents[0, 0, 0, :4] = [3.4e38, -3.4e38, 1.0, -1.0]
    expected = (latents / 2 + np.float32(0.5)).clip(0, 1).transpose(0, 2, 3, 1)
    assert np.array_equal(run(graph, latents), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_where_it_is(value: float, graph: ir.Model) -> None:
    latents = np.zeros((1, 3, 8, 8), np.float32)
    latents[0, 1, 2, 3] = value
    image = run(graph, latents)
    assert np.argwhere(~np.isfinite(image)).tolist() == [[0, 2, 3, 1]]


def test_it_does_not_depend_on_what_clip_makes_of_nan(graph: ir.Model) -> None:
    """Where the clipped value is 0 for NaN, as Max(NaN, 0) is on a GPU, the picture has it all the same."""
    deaf = graph.clone()
    clip = next(node for node in deaf.graph if node.op_type == "Clip")
    where = next(node for node in deaf.graph if node.op_type == "Where")
    zero = ir.val("zero", const_value=ir.tensor(np.float32(0), name="zero"))
    deaf.graph.register_initializer(zero)
    is_nan = ir.node("IsNaN", [clip.outputs[0]])
    black = ir.node("Where", [is_nan.outputs[0], zero, clip.outputs[0]])
    deaf.graph.insert_before(where, [is_nan, black])
    where.replace_input_with(list(where.inputs).index(clip.outputs[0]), black.outputs[0])
    assert np.isnan(run(deaf, np.full((1, 3, 2, 2), np.nan, np.float32))).all()


def test_a_layer_whose_weights_are_not_finite_keeps_its_name_so_that_packing_finds_it() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        layer[0].weight[1, 2] = torch.nan
    graph = trace(layer, {"input": Example(torch.randn(2, 5, 4), ("batch", "tokens", None))}, ["y"])
    assert "0.weight.T" in graph.graph.initializers
