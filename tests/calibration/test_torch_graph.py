"""A graph run by torch gives what ONNX Runtime gives, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import residual
import torch
from graphs import parsed

from trimtab.calibration.torch_graph import TorchGraph
from trimtab.errors import PassError
from trimtab.weights import parameter_count


def inputs_of(model: ir.Model) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = {"batch": 1, "rows": 2, "rows*batch": 2, "tokens": 32, "latent_height": 8, "latent_width": 8}
    inputs = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name
        array = generator.normal(size=[d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape])
        if not value.dtype.is_floating_point():
            array = np.abs(array * 100) % 10
        if value.name.endswith("mask"):
            array = array > 0
        inputs[value.name] = np.asarray(array, value.dtype.numpy())
    return inputs


@pytest.mark.parametrize("family", ["dit", "sd15", "sdxl", "sana_sprint", "z_image", "controlnet", "chroma"])
def test_torch_gives_what_onnx_runtime_gives(family: str, bundle_folder: Callable[[str], Path]) -> None:
    path = bundle_folder(family) / "graphs" / "denoiser.onnx"
    model = ir.load(path)
    inputs = inputs_of(model)
    names = ["next_sample", "model_output"]
    expected = onnxruntime.InferenceSession(path).run(names, inputs)
    graph = TorchGraph(model, names)
    results = graph({name: torch.from_numpy(array) for name, array in inputs.items()})
    for wanted, name in zip(expected, names, strict=True):
        error = np.abs(results[name].numpy() - wanted).max() / np.abs(wanted).max()
        assert error <= 1e-5, name
    # Tables of frequencies are the only numbers that are not trained.
    trained = sum(tensor.numel() for tensor in graph.weights.values())
    assert 0.97 * parameter_count(model) <= trained <= parameter_count(model)
    # And those that the exporter made up, but for weights that it gave an axis more (Sana's scale_shift_table[None]).
    own = ("unsqueeze_", "x_pad_token", "cap_pad_token")  # Z-Image's belong to no module inside of the model
    assert all("." in name or name.startswith(own) for name in graph.weights)


def test_gradients_are_those_of_small_changes() -> None:
    graph = TorchGraph(residual.denoiser(), ["model_output"])
    inputs = {name: torch.from_numpy(np.array(a)) for name, a in residual.inputs().items()}
    name = "blocks.1.second.weight"
    weight = graph.weights[name].clone().requires_grad_()
    graph(inputs, {**graph.weights, name: weight})["model_output"].square().sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    step = 1e-2
    ends = []
    for sign in (1, -1):
        moved = graph.weights[name].clone()
        moved[2, 3] += sign * step
        result = graph(inputs, {**graph.weights, name: moved})["model_output"]
        ends.append(result.double().square().sum().item())
    assert weight.grad[2, 3].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2, abs=1e-4)


def test_values_inside_can_be_asked_for() -> None:
    model = residual.denoiser()
    inner = next(node.outputs[0] for node in model.graph if node.op_type == "Relu")
    graph = TorchGraph(model, [str(inner.name)])
    inputs = {name: torch.from_numpy(np.array(a)) for name, a in residual.inputs().items()}
    assert (graph(inputs)[str(inner.name)] >= 0).all()
    # What lies behind it is not computed, and its weights are not held.
    assert set(graph.weights) == {"blocks.0.first.weight"}


@pytest.mark.parametrize(
    ("operator", "integers"),
    [
        ("Pad", [[0, 1, 2, 0, 0, 3]]),
        ("Pad", [[1, -1], None, [-1]]),
        ("Tile", [[2, 1, 3]]),
        ("ReduceMax", [[-1]]),
        ("ReduceMax", [[0, 1]]),
    ],
)
def test_operators_that_few_models_have(operator: str, integers: list[list[int] | None]) -> None:
    data = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    sample = ir.Value(name="x", shape=ir.Shape(data.shape), type=ir.TensorType(ir.DataType.FLOAT))
    arguments = [
        None if n is None else ir.Value(name=f"n{k}", const_value=ir.tensor(np.int64(n), name=f"n{k}"))
        for k, n in enumerate(integers)
    ]
    node = ir.node(operator, [sample, *arguments])
    node.outputs[0].name = "y"
    node.outputs[0].type = sample.type
    held = [value for value in arguments if value is not None]
    graph = ir.Graph(
        [sample], node.outputs, nodes=[node], initializers=held, opset_imports={"": 23}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    found = TorchGraph(model, ["y"])({"x": torch.from_numpy(data)})["y"].numpy()
    np.testing.assert_array_equal(found, session.run(None, {"x": data})[0])


@pytest.mark.parametrize("form", ["", "<fmod = 1>"])
def test_a_remainder_has_the_sign_that_its_form_says(form: str) -> None:
    model = parsed(f"g (int64[4] x, int64[4] d) => (int64[4] y) {{ y = Mod {form} (x, d) }}")
    given = {"x": np.array([-7, 7, -8, 5]), "d": np.array([4, -4, 4, 3])}
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    found = TorchGraph(model, ["y"])({name: torch.from_numpy(array) for name, array in given.items()})["y"]
    np.testing.assert_array_equal(found.numpy(), session.run(None, given)[0])


def test_a_part_starts_from_values_that_are_given() -> None:
    model = residual.denoiser()
    inner = next(node.outputs[0] for node in model.graph if node.op_type == "Relu")
    graph = TorchGraph(model, ["model_output"])
    inputs = {name: torch.from_numpy(np.array(a)) for name, a in residual.inputs().items()}
    given = graph.part([str(inner.name)])(inputs)
    rest = graph.part(["model_output"], given=list(given))
    assert torch.equal(rest(inputs | given)["model_output"], graph(inputs)["model_output"])
    changed = {name: value + 1 for name, value in given.items()}
    assert not torch.equal(rest(inputs | changed)["model_output"], graph(inputs)["model_output"])
    assert str(inner.name) in graph and str(inner.name) not in rest


def test_an_unknown_operator_is_refused_by_name() -> None:
    model = residual.denoiser()
    next(node for node in model.graph if node.op_type == "Relu").op_type = "Mish"
    with pytest.raises(PassError, match="Mish cannot be run by torch"):
        TorchGraph(model, ["model_output"])


def test_an_output_that_is_none_is_refused() -> None:
    with pytest.raises(PassError, match="computes no nothing"):
        TorchGraph(residual.denoiser(), ["nothing"])
