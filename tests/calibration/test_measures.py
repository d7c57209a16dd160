"""What a share is of: exact for weights, and for time what the estimate of the whole graph says of its parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import residual

from trimtab.bundle import open_bundle
from trimtab.calibration.choice import Wish, by_loss
from trimtab.calibration.measures import Measure, parameters, step_time, weight_bytes
from trimtab.errors import InputError
from trimtab.passes.candidates import Candidates
from trimtab.passes.removal import RemoveLayers
from trimtab.targets.bindings import segment_shapes
from trimtab.targets.device import Device, find_device


def with_a_narrow_block() -> ir.Model:
    """The third block, the largest, in 16 bits: as many bytes as the 72 parameters of neither other."""
    model = residual.denoiser()
    for name in ("blocks.2.first.weight", "blocks.2.second.weight"):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=name)
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    return model


def test_bytes_and_parameters_are_those_of_the_initializers() -> None:
    candidates = Candidates(with_a_narrow_block())
    count, size = parameters(candidates), weight_bytes(candidates)
    assert count.freed(["blocks.1", "blocks.2"]) == 96 + 144
    assert size.freed(["blocks.1", "blocks.2"]) == 4 * 96 + 2 * 144
    assert (count.total, size.total) == (candidates.parameters, candidates.bytes)


def test_what_is_chosen_follows_what_the_share_is_of() -> None:
    candidates = Candidates(with_a_narrow_block())
    losses = {"blocks.0": 4.0, "blocks.1": 3.0, "blocks.2": 2.0}
    assert by_loss(candidates, Wish(0.4), losses) == ("blocks.2",)
    assert by_loss(candidates, Wish(0.4), losses, weight_bytes(candidates)) == ("blocks.1",)


@pytest.fixture
def timed(bundle_folder: Callable[[str], Path]) -> tuple[ir.Model, Candidates, Callable[[ir.Model], Measure]]:
    bundle = open_bundle(bundle_folder("dit"))
    model = ir.load(bundle.path("graphs/denoiser.onnx"))
    shapes = segment_shapes(bundle.contents, bundle.contents.size)["denoiser"][0]
    device = find_device("orin-nano-8gb")
    return model, Candidates(model), lambda m: step_time(Candidates(m), m, shapes, device, "fp16")


@pytest.mark.xdist_group("dit")
def test_the_time_that_is_freed_is_nearly_what_the_smaller_graph_saves(timed) -> None:
    model, candidates, measured = timed
    whole = measured(model)
    for name in candidates:
        smaller = model.clone()
        RemoveLayers([name])(smaller)
        saved = whole.total - measured(smaller).total
        # What is left may be fused anew, which only saves more.
        assert 0 < whole.freed([name]) <= saved <= whole.freed([name]) + 0.05 * whole.total, name


@pytest.mark.xdist_group("dit")
def test_the_time_of_what_two_branches_share_is_freed_with_the_second(timed) -> None:
    model, candidates, measured = timed
    whole = measured(model)
    block = candidates["transformer_blocks.0"]
    assert len(block.inside) == 2
    assert (
        whole.freed(block.inside) == whole.freed([block.name]) > sum(whole.freed([n]) for n in block.inside)
    )
    assert whole.details == {"device": "orin-nano-8gb", "precision": "fp16"}
    with pytest.raises(InputError, match=r"ns of a step on orin-nano-8gb in fp16 cannot be done: .* at most"):
        by_loss(candidates, Wish(0.99), dict.fromkeys(candidates, 1.0), whole)


def test_no_time_is_made_up_for_a_device_without_known_peaks() -> None:
    model = residual.denoiser()
    shapes = {name: array.shape for name, array in residual.inputs().items()}
    with pytest.raises(InputError, match="cpu, whose peaks are not known"):
        step_time(Candidates(model), model, shapes, find_device("cpu"), "fp32")


def test_a_cpu_computes_in_fp32_whatever_its_weights_are_stored_in() -> None:
    model = residual.denoiser()
    shapes = {name: array.shape for name, array in residual.inputs().items()}
    mine = Device("mine", "my CPU", "onnxruntime", bandwidth_gb_s=20, fp32_tflops=0.1, precisions=("fp32",))
    measure = step_time(Candidates(model), model, shapes, mine, "fp16")
    assert measure.details == {"device": "mine", "precision": "fp32"}
    assert measure.total == step_time(Candidates(model), model, shapes, mine, "fp32").total > 0
