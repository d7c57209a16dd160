"""Inheritance together with what else a compile does: packed weights, engines of every segment, compare, search."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains import whole

from trimtab.calibration.codebook_plan import Settings
from trimtab.calibration.draft import draft
from trimtab.calibration.kmeans import make_codebooks
from trimtab.comparison import compare
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import FILE as INHERITED
from trimtab.passes.inherit_plan import InheritPlan, make_plan
from trimtab.passes.partition import partition
from trimtab.passes.vq import pack_weights
from trimtab.recipe import Recipe
from trimtab.storage import read_program, write_contents, write_graphs
from trimtab.targets.device import find_device
from trimtab.targets.engines import make_engines
from trimtab.transforms import transform
from trimtab.weights import INLINE_BYTES, WeightStore

BundleFolder = Callable[[str], Path]

pytestmark = pytest.mark.xdist_group("dit")

OPTIONS: dict[str, Any] = {"label": 1, "seed": 0, "schedule": 3}
PLAN = InheritPlan(skip=("layers",), every=2)


def test_compare_measures_a_denoiser_of_several_parts(bundle_folder: BundleFolder, tmp_path: Path) -> None:
    folder = bundle_folder("dit")
    draft(partition(inherit(whole(folder), PLAN)), tmp_path).close()
    result = compare(folder, tmp_path, label=1, schedule="ddim-3")
    full, inheriting, again = result["steps"]
    assert max(full, again) < 1e-5 < inheriting  # steps 0 and 2 run in full
    assert result["picture"] > 0
    names = {module["name"] for module in result["modules"]}
    assert {"transformer_blocks.0.attn1", "transformer_blocks.1.attn1"} <= names
    assert max(module["error"] for module in result["modules"]) < 1e-5


def test_packed_weights_inherit_and_stand_once(bundle_folder: BundleFolder, tmp_path: Path) -> None:
    program = whole(bundle_folder("dit"))
    packed = pack_weights(
        program, make_codebooks({"denoiser": program.segments["denoiser"].model}, Settings())
    )
    with draft(packed, tmp_path / "packed") as pipe:
        expected = pipe(**OPTIONS).pixels
    once = InheritPlan(skip=PLAN.skip, full=tuple(range(20)))
    with draft(partition(inherit(packed, once)), tmp_path / "once") as pipe:
        np.testing.assert_allclose(pipe(**OPTIONS).pixels, expected, rtol=0, atol=1e-5)
    with draft(partition(inherit(packed, PLAN)), tmp_path / "ours") as pipe:
        assert np.abs(pipe(**OPTIONS).pixels - expected).max() > 1e-5
        segments = read_program(pipe.bundle).segments
    parts = [segment.model.graph for name, segment in segments.items() if name.startswith("denoiser.")]
    # Small constants are repeated where they are needed; what weighs something is not.
    large = [
        name
        for graph in parts
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes >= INLINE_BYTES
    ]
    assert len(parts) > 1 and len(large) == len(set(large)) > 0
    assert any("trimtab" in graph.opset_imports for graph in parts)


def test_a_plan_that_asks_for_a_speed_is_searched_by_the_transforms(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    told: list[str] = []
    stage, drifts = tmp_path / "stage", tmp_path / "drifts"
    stage.mkdir()
    recipe = Recipe(inherit=InheritPlan(skip=("layers",), speed=1.2), drifts=str(drifts))
    program = transform(whole(bundle_folder("dit")), recipe, stage, told.append)
    assert any("inheritance in ddim-20: " in text for text in told)
    assert [entry.name for entry in program.passes][-2:] == ["Inherit", "Partition"]
    # What was found is in the bundle, as a plan that a second compile takes as it is.
    assert drifts.exists() and [path.name for path in stage.iterdir()] == [INHERITED]
    again = transform(whole(bundle_folder("dit")), Recipe(inherit=make_plan(stage / INHERITED)), stage, print)
    assert again.tasks == program.tasks
    with draft(program, tmp_path / "ours") as pipe:
        assert np.isfinite(pipe(**OPTIONS).pixels).all()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
def test_tensorrt_rtx_builds_every_segment_of_an_inheriting_denoiser(
    bundle_folder: BundleFolder, tmp_path: Path
) -> None:
    program = partition(inherit(whole(bundle_folder("dit")), PLAN))
    (tmp_path / "graphs").mkdir()
    store = WeightStore(tmp_path / "graphs")
    write_graphs(program, tmp_path, store)
    contents = write_contents(program, tmp_path)
    parts = {name: part for name, part in program.segments.items() if name.startswith("denoiser")}
    assert len(parts) > 1
    engines = make_engines(
        parts, contents, [find_device("rtx-4090")], (contents.size,), store, tmp_path, None, print
    )
    for name in parts:
        assert engines[name] and all(engine.built and engine.bytes > 1000 for engine in engines[name])
