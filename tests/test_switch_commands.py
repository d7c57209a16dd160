"""Switching denoisers from the command line: bundles, plans and students, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from test_removal_commands import Here, denoiser, run

import trimtab
from trimtab import apart, compiler
from trimtab.bundle import open_bundle
from trimtab.calibration.draft import draft
from trimtab.inspection import inspect
from trimtab.passes.calls import map_calls
from trimtab.passes.partition import partition
from trimtab.program import Call
from trimtab.storage import read_program

pytestmark = pytest.mark.xdist_group("switch-commands")


@pytest.fixture(scope="module", autouse=True)
def in_one_process() -> Iterator[None]:
    """What exports in a process of its own does it here: that is the subject of other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "Child", Here)
        yield


def segments(bundle: Path) -> list[str]:
    return [name for step in inspect(trimtab.load(bundle).bundle)["schedules"][0]["calls"] for name in step]


def latents(bundle: Path, upto: int | None = None, start: np.ndarray | None = None) -> list[np.ndarray]:
    """The sampler's state after every step; the first steps may be left out, with the state that they gave."""
    with trimtab.load(bundle) as pipe:
        request, plan, _ = pipe.prepare(seed=0)
        plan.begin(request)
        if start is not None and upto is not None:
            plan.buffers["state"][...] = start
        states = []
        for step in plan.steps[0 if start is None else upto : upto if start is None else None]:
            step.run(request)
            states.append(plan.buffers["state"].copy())
        return states


def test_a_bundle_and_a_plan_of_the_same_model_take_over_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, whole, small = denoiser(tmp_path / "model"), tmp_path / "whole", tmp_path / "small"
    assert run("compile", model, "--steps", 5, "-o", whole) == 0
    assert run("compile", model, "--steps", 5, "--remove", 0.3, "-o", small) == 0
    for name, other in (("by-bundle", small), ("by-plan", small / "removal.json")):
        if name == "by-plan":
            other = shutil.copy(other, tmp_path / "small.json")
        assert run("compile", model, "--steps", 5, "--switch", f"{other}@0.4", "-o", tmp_path / name) == 0
        assert segments(tmp_path / name) == ["denoiser"] * 2 + ["denoiser-small"] * 3
    first = latents(whole, 2)
    expected = [*first, *latents(small, 2, first[-1])]
    for name in ("by-bundle", "by-plan"):
        for ours, theirs in zip(latents(tmp_path / name), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert np.abs(latents(whole)[-1] - expected[-1]).max() > 1e-6
    # Weights that both denoisers read stand once.
    listed = inspect(trimtab.load(tmp_path / "by-plan").bundle)
    parameters = {segment["name"]: segment["parameters"] for segment in listed["segments"]}
    assert parameters["denoiser"] == 192 and parameters["denoiser-small"] == 128
    capsys.readouterr()


def test_a_student_takes_over_from_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, small, student = denoiser(tmp_path / "model"), tmp_path / "small", tmp_path / "student"
    assert run("compile", model, "--steps", 3, "--remove", 0.3, "-o", small) == 0
    command = ("distill", model, "--plan", small / "removal.json", "--steps", 2, "--trajectories", 1)
    assert run(*command, "-o", student) == 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'steps = 5\n[switch]\n"{student}" = 0.4\n"{small / "removal.json"}" = 0.8\n')
    assert run("compile", model, "--recipe", recipe, "-o", tmp_path / "x") == 0
    assert segments(tmp_path / "x") == ["denoiser"] * 2 + ["denoiser-student"] * 2 + ["denoiser-removal"]
    # What removal left untrained is what the plan alone gives.
    models = [ir.load(tmp_path / "x" / "graphs" / f"denoiser-{name}.onnx") for name in ("student", "removal")]
    trained, plain = ({n: v.const_value.numpy() for n, v in m.graph.initializers.items()} for m in models)
    assert trained.keys() == plain.keys()
    assert any(not np.array_equal(trained[name], plain[name]) for name in plain)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ("small", "PATH@SHARE is needed"),
        ("small@", "PATH@SHARE is needed"),
        ("@0.4", "the switch to nothing at 0.4"),
        ("small@1.5", "a share of the steps between 0 and 1"),
        ("small@0", "a share of the steps between 0 and 1"),
        ("small@nan", "a share of the steps between 0 and 1"),
        ("other@0.4", "cannot take over: noise is among the inputs of only one"),
        ("small@0.01", "no step would call denoiser: the schedules ddim-5 are too short"),
        ("damaged@0.4", "copy the bundle again"),
    ],
)
def test_what_cannot_be_switched_to_is_refused_in_one_line(
    switch: str, message: str, bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(bundles)
    command = ("compile", "model/model.toml", "--steps", 5, "--switch", switch)
    assert run(*command, "-o", tmp_path / "x") == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in told and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none@0.4"], "none is not there: give a bundle, a removal plan or a student's folder"),
        (["model@0.4"], "removal.json does not exist"),
        (["model/model.toml@0.4"], "is no removal plan"),
        (
            ["few@0.4"],
            "the denoiser few was compiled with another ddim-5, or with none: compile both with the",
        ),
        (["small@0.4", "--steps", 7], "the denoiser small was compiled with another ddim-7, or with none"),
        (["small@0.4", "--scheduler", "ddpm"], "was compiled with another ddpm-5, or with none"),
        (["small@0.4", "--scheduler", "DDPMScheduler"], "was compiled with another ddpm-5, or with none"),
        (["cut@0.4"], "cut has denoiser.0 in the place of one whole denoiser"),
        (["switched@0.4"], "switched has denoiser, denoiser-small in the place of one whole denoiser"),
    ],
)
def test_what_its_own_files_rule_out_is_refused_before_the_export(
    options: list[str | int], message: str, bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def exported(*arguments: object) -> None:
        raise AssertionError("the model is exported")

    monkeypatch.chdir(bundles)
    monkeypatch.setattr(compiler, "export_model", exported)
    assert run("compile", "model/model.toml", "--steps", 5, "--switch", *options, "-o", tmp_path / "x") == 1
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told and not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and bundles that can or cannot take over from it."""
    folder = tmp_path_factory.mktemp("bundles")
    model = denoiser(folder / "model")
    run("compile", model, "--steps", 5, "--remove", 0.3, "-o", folder / "small")
    run("compile", model, "--steps", 4, "-o", folder / "few")
    run("compile", model, "--steps", 5, "--scheduler", "ddpm", "-o", folder / "other")
    program = read_program(open_bundle(folder / "small"))
    inner = next(n for n in program.segments["denoiser"].model.graph if n.op_type == "MatMul").outputs[0].name
    keeping = map_calls(program.tasks, lambda calls: tuple(_keeping(call, str(inner)) for call in calls))
    draft(partition(dataclasses.replace(program, tasks=keeping)), folder / "cut").close()
    run("compile", model, "--steps", 5, "--switch", f"{folder / 'small'}@0.4", "-o", folder / "switched")
    shutil.copytree(folder / "small", folder / "damaged")
    next((folder / "damaged" / "graphs").glob("denoiser*")).write_bytes(b"")
    return folder


def _keeping(call: Call, value: str) -> Call:
    return dataclasses.replace(call, outputs={**call.outputs, value: "kept"})
