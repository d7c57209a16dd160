"""Which precision a target gets, and bundles compiled in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import trimtab
import trimtab.compiler
from trimtab.bundle import open_bundle
from trimtab.calibration.ranges import load_ranges
from trimtab.errors import InputError
from trimtab.recipe import make_recipe
from trimtab.storage import read_program
from trimtab.targets.device import Device, find_device
from trimtab.targets.precision import choose_precision, in_precision

pytestmark = pytest.mark.xdist_group("dit")


def test_a_target_has_its_own_precision_unless_one_is_asked_for() -> None:
    assert make_recipe({}).precision is None
    assert choose_precision(None, find_device("cpu")) == "fp32"
    assert choose_precision(None, find_device("orin-nano-8gb")) == "fp16"
    for asked in ("fp32", "fp16", "bf16"):
        assert choose_precision(asked, find_device("rtx-4090")) == asked
    assert choose_precision("fp16", find_device("cpu")) == "fp16"
    assert (
        choose_precision(None, Device("old", "an old GPU", "tensorrt", sm="6.1", precisions=("fp32",)))
        == "fp32"
    )


def test_a_precision_that_a_device_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(InputError, match="cpu has no bf16: choose fp32 or fp16"):
        choose_precision("bf16", find_device("cpu"))
    old = Device("old", "an old GPU", "tensorrt", sm="7.5", precisions=("fp32", "fp16", "int8"))
    with pytest.raises(InputError, match="old has no bf16: choose fp32 or fp16"):
        choose_precision("bf16", old)
    with pytest.raises(InputError, match="'fp8' is not one of fp32, fp16, bf16"):
        make_recipe({"precision": "fp8"})


def test_what_stays_in_float32_is_logged_by_its_module(
    bundle_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    program = read_program(open_bundle(bundle_folder("dit")))
    block = next(
        node.outputs[0]
        for node in program.segments["denoiser"].model.graph
        if node.op_type == "Gelu"
        and "transformer_blocks.1" in node.metadata_props["pkg.torch.onnx.name_scopes"]
    )
    ranges: dict[str, dict[str, float]] = {"denoiser": {str(block.name): 1e5}, "vae_decoder": {}}
    with caplog.at_level(logging.WARNING):
        converted = in_precision(program, "fp16", ranges)
    assert "denoiser: transformer_blocks.1.ff" in caplog.text and "stays in fp32" in caplog.text
    (entry,) = (e for e in converted.passes if e.segment == "denoiser" and e.name == "ConvertPrecision fp16")
    assert entry.refused >= 1 and entry.applied > 100


def test_a_bundle_in_fp16_keeps_the_graphs_as_they_were_before_they_measured_themselves(
    bundle_folder: Callable[[str], Path],
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = read_program(open_bundle(bundle_folder("dit")))
    monkeypatch.setattr(trimtab.compiler, "export_model", lambda *_: whole)
    bundle = trimtab.compile(pipeline_folder("dit"), tmp_path / "half", precision="fp16")
    for name, segment in read_program(bundle).segments.items():
        outputs = [value.name for value in segment.model.graph.outputs]
        assert outputs == [spec.name for spec in bundle.contents.segments[name].outputs]


@pytest.mark.slow
def test_a_bundle_in_fp16_draws_the_same_picture_with_half_the_weights(
    bundle_folder: Callable[[str], Path], pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    trimtab.compile(pipeline_folder("dit"), tmp_path / "half", steps=3, precision="fp16")
    request = {"label": 1, "seed": 3, "schedule": 3}
    with trimtab.load(tmp_path / "half") as half, trimtab.load(bundle_folder("dit")) as whole:
        difference = np.abs(half(**request).pixels - whole(**request).pixels).max()
        weights = {
            path.name: path.stat().st_size for path in (half.bundle.folder / "graphs").glob("*.weights")
        }
        ranges = half.bundle.path("calibration/ranges.json")
    assert 0 < difference <= 2 / 255
    assert 0.45 < weights["denoiser.fp16.weights"] / weights["denoiser.weights"] < 0.55
    assert load_ranges(ranges).segments.keys() == {"denoiser", "vae_decoder"}
