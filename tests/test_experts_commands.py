"""Experts from the command line: trained, compiled, drawn with, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import trimtab
from trimtab.cli import main
from trimtab.passes.candidates import Candidates
from trimtab.passes.removal import RemovalPlan

pytestmark = pytest.mark.xdist_group("sd15")


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_a_student_with_experts_draws_with_a_denoiser_for_every_range(
    pipeline_folder: Callable[[str], Path],
    bundle_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, student, bundle = pipeline_folder("sd15"), tmp_path / "student", tmp_path / "b"
    candidates = Candidates(ir.load(bundle_folder("sd15") / "graphs" / "denoiser.onnx"))
    RemovalPlan(candidates.fingerprint, tuple(candidates)[1:2], "by hand").save(tmp_path / "plan.json")
    command = ("distill", model, "--plan", tmp_path / "plan.json", "--steps", 6, "--trajectories", 1)
    command += ("--experts", 2, "--expert-ranges", 3, "--experts-in", "mid_block.*.conv?")
    assert run(*command, "-o", student, "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert run("compile", model, "--steps", 20, "--removal-plan", student, "-o", bundle) == 0
    capsys.readouterr()
    assert run("inspect", bundle, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    parameters = {s["name"]: s["parameters"] for s in listed["segments"] if s["name"].startswith("denoiser")}
    middle = ["denoiser.1", "denoiser-mix2.1", "denoiser-mix3.1"]
    assert parameters.keys() == {"denoiser.0", *middle, "denoiser.2"}
    steps = [["denoiser.0", name, "denoiser.2"] for name in middle]
    assert listed["schedules"][0]["calls"] == [steps[0]] * 6 + [steps[1]] * 7 + [steps[2]] * 7
    assert run("inspect", bundle) == 0
    shown = [line.split()[2:] for line in capsys.readouterr().out.splitlines() if " ddim-20 " in line][:3]
    assert shown == [[count, *" + ".join(step).split()] for count, step in zip("677", steps, strict=True)]
    with trimtab.load(bundle) as ours, trimtab.load(bundle_folder("sd15")) as whole:
        plain = whole.bundle.contents.segments["denoiser"].parameters
        left = plain - candidates.freed(tuple(candidates)[1:2])[0]
        assert {sum(parameters[name] for name in step) for step in steps} == {left}
        picture, other = (pipe("a red circle", seed=0).pixels for pipe in (ours, whole))
    assert 1e-6 < np.abs(picture - other).max() < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "a student that lacks nothing has nothing to learn from its teacher: give a removal plan"),
        (("--experts", 2), "nothing to learn from its teacher: give a removal plan, or experts and data"),
        (("--experts", 1), "1 experts in 1 ranges of time steps were asked for: give two experts or more"),
        (("--experts", 4, "--expert-ranges", 3), "at least as many ranges"),
        (("--expert-ranges", 3), "say more of --experts: give it too"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    options: tuple[object, ...],
    message: str,
    pipeline_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("distill", pipeline_folder("sd15"), "--steps", 1, "--trajectories", 1, "-o", tmp_path / "s")
    assert run(*command, *options) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())
