"""Calibration of codes: the mixtures, their end, and what training is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trimtab.calibration.codebooks import Codebooks
from trimtab.calibration.kmeans import pack
from trimtab.calibration.vq4dit import PackedLayer, Training, block_of, calibrate
from trimtab.errors import CalibrationError
from trimtab.passes import vq_op


class Block(nn.Module):
    """A residual block with a convolution in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.out = nn.Conv2d(32, 16, 1)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden = torch.relu(self.conv(x) + shift)
        return x + self.out(hidden), [hidden]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            sample, _ = block(sample, shift=timestep)
        return sample


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.model(sample, timestep)


@pytest.fixture
def module() -> Wrapper:
    torch.manual_seed(0)
    return Wrapper(Model()).eval()


def packed(module: Wrapper) -> Codebooks:
    weights = {n: p for n, p in module.model.named_parameters() if n.endswith("weight")}
    return Codebooks("", {n: pack(vq_op.to_rows(p.detach().numpy()), 2, 16) for n, p in weights.items()})


def inputs(count: int = 6) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{"sample": torch.randn(4, 16, 6, 6), "timestep": torch.tensor(0.1 * k)} for k in range(count)]


def error(module: Wrapper, books: Codebooks) -> float:
    weights = {
        f"model.{n}": torch.from_numpy(
            np.ascontiguousarray(vq_op.from_rows(layer.rows(), module.get_parameter(f"model.{n}").shape))
        )
        for n, layer in books.layers.items()
    }
    weights |= {f"model.{n}": torch.from_numpy(b) for n, b in books.parameters.items()}
    with torch.no_grad():
        pairs = [(torch.func.functional_call(module, weights, (), v), module(**v)) for v in inputs()]
    return float(torch.stack([(a - b).square().mean() / b.square().mean() for a, b in pairs]).mean())


def test_the_first_mixture_is_led_by_the_nearest_codeword(module: Wrapper) -> None:
    dense = module.model.blocks[0].conv.weight
    weight = packed(module).layers["blocks.0.conv.weight"]
    layer = PackedLayer(weight, dense, candidates=3)
    np.testing.assert_array_equal(layer.choices[:, 0].reshape(32, -1), weight.codes)
    assert (layer.ratios().argmax(1) == 0).all() and not layer.hard
    assert 0 < float(layer.undecided().detach()) < 1
    layer.harden()
    expected = vq_op.from_rows(weight.rows(), dense.shape)
    np.testing.assert_array_equal(layer.weight().detach().numpy(), expected)


def test_a_choice_that_is_made_no_longer_moves(module: Wrapper) -> None:
    layer = PackedLayer(packed(module).layers["blocks.0.out.weight"], module.model.blocks[0].out.weight, 2)
    with torch.no_grad():
        layer.logits[:] = torch.tensor([0.0, 10.0])
    assert float(layer.undecided().detach()) == 0
    layer.weight().square().sum().backward()
    assert layer.logits.grad is None or float(layer.logits.grad.abs().max()) == 0
    layer.settle()
    assert layer.hard


def test_calibration_beats_k_means_and_leaves_the_model_alone(module: Wrapper) -> None:
    before = {n: p.clone() for n, p in module.named_parameters()}
    books = packed(module)
    made = calibrate(module, books, inputs(), Training(minutes=4 / 60, codebook_rate=2e-3))
    assert error(module, made) < 0.7 * error(module, books)
    assert set(made.parameters) == {f"blocks.{k}.{name}.bias" for k in (0, 1) for name in ("conv", "out")}
    assert all(layer.method == "calibrated" for layer in made.layers.values())
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name])


def test_one_candidate_keeps_the_assignments(module: Wrapper) -> None:
    books = packed(module)
    made = calibrate(module, books, inputs(2), Training(minutes=1 / 60, candidates=1))
    for name, layer in made.layers.items():
        np.testing.assert_array_equal(layer.codes, books.layers[name].codes)


def test_what_it_cannot_work_on_is_refused(module: Wrapper) -> None:
    with pytest.raises(CalibrationError, match="no inputs were given"):
        calibrate(module, packed(module), [], Training(minutes=1))
    books = Codebooks("", {"other.weight.T": packed(module).layers["blocks.0.out.weight"]})
    with pytest.raises(CalibrationError, match=r"the model has no other\.weight"):
        calibrate(module, books, inputs(1), Training(minutes=1))


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
