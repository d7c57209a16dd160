"""Calibration of codes: the mixtures, their end, and what training is worth."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch

from trimtab.calibration.kmeans import pack
from trimtab.calibration.torch_graph import TorchGraph
from trimtab.calibration.vq4dit import PackedLayer, Training, _distance, block_of, calibrate
from trimtab.errors import CalibrationError
from trimtab.passes import vq_op
from trimtab.passes.codebooks import CALIBRATED, Codebooks
from trimtab.passes.scopes import SCOPES
from trimtab.passes.vq import sites

CHANNELS = 16


def denoiser(*, named: bool = True) -> ir.Model:
    """Two residual blocks of convolutions, ``x + out(relu(conv(x) + timestep))``, and a MatMul with a bias behind."""
    generator = np.random.default_rng(0)
    weights: list[ir.Value] = []
    nodes: list[ir.Node] = []

    def weight(name: str, *shape: int) -> ir.Value:
        array = generator.normal(scale=np.prod(shape[1:], initial=1.0) ** -0.5, size=shape).astype(np.float32)
        weights.append(ir.Value(name=name, shape=ir.Shape(shape), const_value=ir.tensor(array, name=name)))
        return weights[-1]

    def node(
        op: str, inputs: list[ir.Value], block: str, attributes: dict[str, list[int]] | None = None
    ) -> ir.Value:
        made = ir.node(op, inputs, attributes)
        if named:
            made.metadata_props[SCOPES] = repr(["", block, op] if block else ["", op])
        nodes.append(made)
        output = made.outputs[0]
        output.name, output.type = f"v{len(nodes)}", ir.TensorType(ir.DataType.FLOAT)
        return output

    float32 = ir.TensorType(ir.DataType.FLOAT)
    sample = ir.Value(name="sample", shape=ir.Shape(["batch", CHANNELS, 6, 6]), type=float32)
    timestep = ir.Value(name="timestep", shape=ir.Shape([]), type=float32)
    running = sample
    for block in ("blocks.0", "blocks.1"):
        inner = [weight(f"{block}.conv.weight", 32, CHANNELS, 3, 3), weight(f"{block}.conv.bias", 32)]
        hidden = node("Conv", [running, *inner], block, {"pads": [1, 1, 1, 1]})
        hidden = node("Relu", [node("Add", [hidden, timestep], block)], block)
        outer = [weight(f"{block}.out.weight", CHANNELS, 32, 1, 1), weight(f"{block}.out.bias", CHANNELS)]
        running = node("Add", [running, node("Conv", [hidden, *outer], block)], block)
    last = node("Transpose", [running], "", {"perm": [0, 2, 3, 1]})
    last = node("MatMul", [last, weight("blocks.2.weight.T", CHANNELS, 24)], "blocks.2")
    last = node("Add", [weight("blocks.2.bias", 24), last], "blocks.2")
    last.name = "model_output"
    graph = ir.Graph(
        [sample, timestep], [last], nodes=nodes, initializers=weights, opset_imports={"": 23}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return denoiser()


def packed(model: ir.Model) -> Codebooks:
    return Codebooks("", {site.name: pack([site.rows()], 2, 16)[0] for site in sites(model)})


def inputs(count: int = 6) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [
        {
            "sample": generator.normal(size=(4, CHANNELS, 6, 6)).astype(np.float32),
            "timestep": np.float32(0.1 * k),
        }
        for k in range(count)
    ]


def error(model: ir.Model, books: Codebooks) -> float:
    graph = TorchGraph(model, ["model_output"])
    weights = dict(graph.weights)
    for site in sites(model):
        weights[site.name] = torch.from_numpy(site.laid_out(books.layers[site.name].rows()))
    weights |= {name: torch.from_numpy(array) for name, array in books.parameters.items()}
    errors = []
    for values in inputs():
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in values.items()}
        found, wanted = (graph(given, w)["model_output"] for w in (weights, graph.weights))
        errors.append(float((found - wanted).square().mean() / wanted.square().mean()))
    return float(np.mean(errors))


def layer_of(model: ir.Model, name: str, candidates: int) -> PackedLayer:
    site = next(site for site in sites(model) if site.name == name)
    weight = packed(model).layers[name]
    return PackedLayer(weight, torch.nn.Parameter(torch.from_numpy(weight.codebook)), site, candidates)


@pytest.mark.parametrize("name", ["blocks.0.conv.weight", "blocks.0.out.weight", "blocks.2.weight.T"])
def test_the_first_mixture_is_led_by_the_nearest_codeword(model: ir.Model, name: str) -> None:
    layer = layer_of(model, name, candidates=3)
    weight, site = layer.packed, layer.site
    np.testing.assert_array_equal(layer.choices[:, 0].reshape(site.shape[0], -1), weight.codes)
    assert (layer.ratios().argmax(1) == 0).all() and not layer.hard
    assert 0 < float(layer.undecided().detach()) < 1
    layer.harden()
    expected = vq_op.from_rows(weight.rows(), site.shape)
    found = layer.weight().detach().numpy()
    np.testing.assert_array_equal(found, expected.T if site.inputs_first else expected)
    assert found.shape == tuple(site.value.const_value.shape.numpy())


def test_a_choice_that_is_made_no_longer_moves(model: ir.Model) -> None:
    layer = layer_of(model, "blocks.0.out.weight", candidates=2)
    with torch.no_grad():
        layer.logits[:] = torch.tensor([0.0, 10.0])
    assert float(layer.undecided().detach()) == 0
    layer.weight().square().sum().backward()
    assert layer.logits.grad is None or float(layer.logits.grad.abs().max()) == 0
    layer.settle()
    assert layer.hard


@pytest.mark.parametrize("named", [True, False])
def test_calibration_beats_k_means_and_leaves_the_model_alone(named: bool) -> None:
    model = denoiser(named=named)  # without names of modules the whole graph is one block
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    books = packed(model)
    made = calibrate(model, books, inputs(), Training(minutes=4 / 60, codebook_rate=2e-3))
    assert error(model, made) < 0.7 * error(model, books)
    assert set(made.parameters) == {name for name in before if name.endswith("bias")}
    assert all(layer.method == CALIBRATED for layer in made.layers.values())
    for name, value in model.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), before[name])


def test_one_candidate_keeps_the_assignments(model: ir.Model) -> None:
    books = packed(model)
    made = calibrate(model, books, inputs(2), Training(minutes=1 / 60, candidates=1))
    for name, layer in made.layers.items():
        np.testing.assert_array_equal(layer.codes, books.layers[name].codes)


def test_a_codebook_that_layers_share_is_trained_once_for_all_of_them(model: ir.Model) -> None:
    places = {site.name: site for site in sites(model)}
    shared = dict(zip(places, pack([site.rows() for site in places.values()], 2, 16), strict=True))
    made = calibrate(model, Codebooks("", shared), inputs(2), Training(minutes=1 / 60, codebook_rate=2e-3))
    first, *others = made.layers.values()
    assert others and all(np.array_equal(layer.codebook, first.codebook) for layer in others)
    assert not np.array_equal(first.codebook, next(iter(shared.values())).codebook)


def test_what_is_calibrated_already_stays(model: ir.Model) -> None:
    books = packed(model)
    first = {name: layer for name, layer in books.layers.items() if name.startswith("blocks.0")}
    done = {name: dataclasses.replace(layer, method=CALIBRATED) for name, layer in first.items()}
    bias = np.full(CHANNELS, 0.25, np.float32)
    given = dataclasses.replace(
        books, layers={**books.layers, **done}, parameters={"blocks.1.out.bias": bias}
    )
    made = calibrate(model, given, inputs(2), Training(minutes=1 / 60))
    assert all(made.layers[name] is layer for name, layer in done.items())
    np.testing.assert_array_equal(made.parameters["blocks.1.out.bias"], bias)
    assert set(made.parameters) == {"blocks.1.conv.bias", "blocks.1.out.bias", "blocks.2.bias"}


def test_what_is_calibrated_already_is_read_as_its_codes_say(model: ir.Model) -> None:
    """They need not be the nearest: the block behind is held against what they decode to."""
    books = packed(model)
    errors = {}
    for shift in (0, 1):
        done = {
            name: dataclasses.replace(layer, codes=(layer.codes + shift) % 16, method=CALIBRATED)
            for name, layer in books.layers.items()
            if name.startswith("blocks.0")
        }
        told: list[str] = []
        given = dataclasses.replace(books, layers={**books.layers, **done})
        calibrate(model, given, inputs(1), Training(minutes=1 / 60), progress=told.append)
        (text,) = [line for line in told if line.startswith("assigned blocks.1")]
        errors[shift] = float(text.partition("error ")[2].partition(" ")[0])
    assert errors[1] > 3 * errors[0]


def test_a_block_that_gives_zeros_is_held_against_zeros() -> None:
    found, zeros = torch.full((2, 2), 0.5), torch.zeros(2, 2)
    assert float(_distance([zeros], [zeros])) == 0 and float(_distance([found], [zeros])) == 0.25
    assert float(_distance([zeros], [found])) == 1


def test_what_it_cannot_work_on_is_refused(model: ir.Model) -> None:
    with pytest.raises(CalibrationError, match="no inputs were given"):
        calibrate(model, packed(model), [], Training(minutes=1))
    books = Codebooks("", {"other.weight.T": packed(model).layers["blocks.0.out.weight"]})
    with pytest.raises(CalibrationError, match=r"the model has no other\.weight"):
        calibrate(model, books, inputs(1), Training(minutes=1))


@pytest.mark.parametrize(
    ("parameter", "block"),
    [
        ("transformer_blocks.3.ff.net.2.weight", "transformer_blocks.3"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight", "down_blocks.0"),
        ("mid_block.resnets.1.conv1.weight", "mid_block.resnets.1"),
    ],
)
def test_a_block_is_the_outermost_repeated_one(parameter: str, block: str) -> None:
    assert block_of(parameter) == block
