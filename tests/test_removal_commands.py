"""Layer removal from the command line: score, compile, distill, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import foreign
import numpy as np
import onnx_ir as ir
import pytest

from trimtab.cli import main


def denoiser(folder: Path, branches: int = 3) -> Path:
    """A model of residual branches of 64 parameters each; gives its TOML file."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    # What lies inside has shapes, as `onnx.shape_inference` writes them: without any, nothing is known to fit.
    inside, body, running = ["float[N,3,H,8] h0"], "h0 = Tanh(sample)", "h0"
    for index in range(branches):
        numbers = ", ".join(f"{n:.4f}" for n in generator.normal(size=64) * 0.3 / (index + 1))
        inside.append(f"float[8,8] w{index} = {{{numbers}}}")
        result = "out_sample" if index == branches - 1 else f"h{index + 1}"
        body += f" m{index} = MatMul({running}, w{index}) b{index} = Tanh(m{index}) {result} = Add({running}, b{index})"
        made = {f"m{index}", f"b{index}", result} - {"out_sample"}
        inside += [f"float[N,3,H,8] {name}" for name in sorted(made)]
        running = result
    interface = ("float[N,3,H,8] sample, float timestep", "float[N,3,H,8] out_sample")
    foreign.write(folder / "denoiser.onnx", *interface, f"<{', '.join(inside)}> {{ {body} }}")
    (folder / "model.toml").write_text(foreign.PIXELS)
    return folder / "model.toml"


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def weights(bundle: Path) -> dict[str, np.ndarray]:
    model = ir.load(bundle / "graphs" / "denoiser.onnx")
    arrays = {str(v.name): v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value}
    return {name: array for name, array in arrays.items() if array.shape == (8, 8)}


def test_layers_are_scored_removed_and_distilled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = denoiser(tmp_path / "model")
    losses, bundle, student = tmp_path / "losses", tmp_path / "small.bundle", tmp_path / "student"
    assert run("score", model, "--samples", 16, "--steps", 3, "-o", losses, "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert [c["parameters"] for c in scored["candidates"]] == [64, 64, 64]
    known = losses.read_text()

    assert run("compile", model, "--steps", 3, "--remove", 0.3, "--scores", losses, "-o", bundle) == 0
    assert losses.read_text() == known  # nothing was measured again
    plan = json.loads((bundle / "removal.json").read_text())
    cheapest = min(scored["candidates"], key=lambda c: c["loss"])
    assert plan["removed"] == [cheapest["name"]] and plan["parameters"] == [192, 128]
    assert len(weights(bundle)) == 2

    command = ("distill", model, "--plan", bundle / "removal.json", "--steps", 4, "--trajectories", 2)
    assert run(*command, "-o", student, "--json") == 0
    assert "steps" in capsys.readouterr().out
    trained = tmp_path / "trained.bundle"
    assert run("compile", model, "--steps", 3, "--removal-plan", student, "-o", trained) == 0
    before, after = weights(bundle), weights(trained)
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.glob("*.checkpoint"))

    # Neither the plan nor the weights go into another model.
    other = denoiser(tmp_path / "other", 4)
    assert run("compile", other, "--steps", 3, "--removal-plan", student, "-o", tmp_path / "x") == 1
    assert "made for another model" in capsys.readouterr().err
    assert run("distill", other, "--plan", student, "--steps", 1, "-o", tmp_path / "x") == 1
    assert "made for another model" in capsys.readouterr().err
    assert run("score", other, "--steps", 3, "-o", losses) == 1
    assert "losses of another model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and losses.read_text() == known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--remove", 0.99, "--keep", "h0->h1"], "at most 128 can go; some were to be kept"),
        (["--remove", 0.3, "--keep", "h0->h9"], "nothing that can be removed matches h0->h9: near are"),
        (["--remove", 0.3, "--drop", "h0->h1", "--keep", "h0->h1"], "is to be kept and to be dropped"),
        (["--remove", 1.5], "not between 0 and 1"),
        (["--remove", 0.3, "--remove-by", "luck"], "no method luck"),
        (["--remove", 0.3, "--remove-by", "bk-sdm-small"], "made for the U-Net of Stable Diffusion 1"),
        (["--remove", 0.3, "--removal-plan", "x"], "give one of them"),
        (["--removal-plan", "none.json"], "none.json cannot be read"),
        (["--keep", "h0->h1"], "give remove as well"),
    ],
)
def test_a_removal_that_cannot_be_done_says_why(
    options: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = denoiser(tmp_path / "model")
    assert run("compile", model, "--steps", 3, *options, "-o", tmp_path / "x") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_training_without_a_budget_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("distill", tmp_path / "none", "--plan", "none.json", "-o", tmp_path / "x") == 1
    assert "give steps or minutes" in capsys.readouterr().err
