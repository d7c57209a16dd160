"""Layer removal from the command line: score, compile, distill, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import onnx_ir as ir
import pytest

from trimtab import apart
from trimtab.bundle import open_bundle
from trimtab.cli import main
from trimtab.passes.calls import map_calls
from trimtab.passes.removal import RemovalPlan
from trimtab.program import Program, Segment
from trimtab.render import as_json
from trimtab.transforms import transform


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


class Here:
    """Takes the place of the process that exports: one that imports torch for each command takes most of the time."""

    def __init__(self, module: str) -> None:
        assert module == apart.__name__

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, job: dict[str, Any]) -> None:
        apart._export(job)


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "Child", Here)


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def strict(text: str) -> Any:
    """JSON as its standard has it, without NaN and Infinity, which Python takes."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def weights(bundle: Path) -> dict[str, np.ndarray]:
    model = ir.load(bundle / "graphs" / "denoiser.onnx")
    arrays = {str(v.name): v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value}
    return {name: array for name, array in arrays.items() if array.shape == (8, 8)}


@pytest.mark.usefixtures("in_one_process")
def test_one_sample_has_no_error_and_its_scores_are_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, losses = denoiser(tmp_path / "model"), tmp_path / "losses"
    arguments = (
        "score",
        model,
        "--samples",
        2,
        "--steps",
        1,
        "-o",
        losses,
    )  # one step: both draws are the same
    assert run(*arguments, "--json") == 0
    scored = strict(capsys.readouterr().out)
    assert scored["samples"] == 1 and [c["error"] for c in scored["candidates"]] == [None] * 3
    assert run(*arguments) == 0
    assert "3 layers on 1 samples" in capsys.readouterr().out


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_json_has_no_number_for_is_printed_as_null(number: float) -> None:
    result = {"steps": [0.5, number], "modules": ({"error": number},)}
    assert strict(as_json(result)) == {"steps": [0.5, None], "modules": [{"error": None}]}


@pytest.mark.usefixtures("in_one_process")
def test_layers_are_scored_removed_and_distilled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = denoiser(tmp_path / "model")
    losses, bundle, student = tmp_path / "losses", tmp_path / "small.bundle", tmp_path / "student"
    assert run("score", model, "--samples", 16, "--steps", 3, "-o", losses, "--json") == 0
    out, err = capsys.readouterr()
    scored = json.loads(out)
    assert [c["parameters"] for c in scored["candidates"]] == [64, 64, 64]
    known = losses.read_text()
    # Four trajectories of three steps have 12 different ones at most; both lines count those that there are.
    lines = re.findall(
        r"(\d+) steps of .* trajectories, then (\d+) evaluations .*: at (least|most) about", err
    )
    count = len(known.splitlines()) - 1
    assert scored["samples"] <= 12 and count == 3 * scored["samples"]
    assert [(int(jobs), bound) for _, jobs, bound in lines] == [(count, "least"), (count, "most")]

    assert run("compile", model, "--steps", 3, "--remove", 0.3, "--scores", losses, "-o", bundle) == 0
    # No score was measured again; of three layers, sets of one are all there are, and their losses are known.
    assert losses.read_text() == known
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
    said = capsys.readouterr().err
    assert "losses of another model" in said and "trajectories" not in said  # before anything was measured
    assert not (tmp_path / "x").exists() and losses.read_text() == known


@pytest.mark.usefixtures("in_one_process")
def test_scores_of_other_samples_than_the_default_are_used_as_they_are(tmp_path: Path) -> None:
    model, losses = denoiser(tmp_path / "model"), tmp_path / "losses"
    assert run("score", model, "--samples", 3, "--steps", 3, "-o", losses) == 0
    known = losses.read_text()
    options = ("compile", model, "--remove", 0.3, "--scores", losses, "-o", tmp_path / "b")
    assert run(*options, "--steps", 3) == 0
    assert losses.read_text() == known


@pytest.mark.usefixtures("in_one_process")
def test_graphs_that_were_measured_and_then_cut_stay_in_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(program: Program, *arguments: Any, **options: Any) -> Program:
        """Stands for what gives a denoiser's parts other names."""
        removed = transform(program, *arguments, **options)
        part = Segment("denoiser.0", removed.segments["denoiser"].model)
        segments = {n: s for n, s in removed.segments.items() if n != "denoiser"} | {part.name: part}
        tasks = map_calls(removed.tasks, lambda calls: tuple(replace(c, segment=part.name) for c in calls))
        return replace(removed, segments=segments, tasks=tasks)

    monkeypatch.setattr("trimtab.compiler.transform", cut)
    bundle = tmp_path / "small.bundle"
    options = ("--steps", 3, "--remove", 0.3, "--remove-by", "random")
    assert run("compile", denoiser(tmp_path / "model"), *options, "-o", bundle) == 0
    assert {path.stem for path in (bundle / "graphs").glob("*.onnx")} == open_bundle(
        bundle
    ).contents.segments.keys()


@pytest.mark.usefixtures("in_one_process")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--remove", 0.99, "--keep", "h0->h1"], "at most 128 can go; some were to be kept"),
        (["--remove", 0.3, "--keep", "h0->h9"], "nothing that can be removed matches h0->h9: did you mean"),
        (["--remove", 0.3, "--drop", "h0->h1", "--keep", "h0->h1"], "is to be kept and to be dropped"),
        (["--remove", 1.5], "not between 0 and 1"),
        (["--remove", 0.3, "--remove-by", "luck"], "no method luck"),
        (["--remove", 0.3, "--remove-by", "bk-sdm-small"], "made for the U-Net of Stable Diffusion 1"),
        (["--remove", 0.3, "--remove-by", "bk-sdm-small", "--keep", "h0->h1"], "is a choice of its own"),
        (["--remove", 0.3, "--removal-plan", "x"], "give one of them"),
        (["--removal-plan", "none.json"], "none.json does not exist"),
        (["--keep", "h0->h1"], "give remove as well"),
        (["--remove-of", "time"], "give remove as well"),
        (["--remove", 0.3, "--remove-of", "luck"], "'luck' is not one of parameters, bytes, time"),
        (["--remove", 0.3, "--remove-of", "time"], "none of the targets cpu is such a one"),
    ],
)
def test_a_removal_that_cannot_be_done_says_why(
    options: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = denoiser(tmp_path / "model")
    assert run("compile", model, "--steps", 3, *options, "-o", tmp_path / "x") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_plan_that_is_not_there_is_said_before_the_model_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = denoiser(tmp_path / "model")
    (tmp_path / "model" / "denoiser.onnx").unlink()
    assert run("compile", model, "--removal-plan", tmp_path / "none", "-o", tmp_path / "x") == 1
    assert "none does not exist: give a removal plan" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "end"), [("--removal-plan", ""), ("--switch", "@0.4")])
@pytest.mark.parametrize("damaged", ["weights.safetensors", "experts.json", "removal.json"])
def test_a_student_that_is_damaged_is_said_before_the_model_is_exported(
    damaged: str, option: str, end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, student = denoiser(tmp_path / "model"), tmp_path / "student"
    (tmp_path / "model" / "denoiser.onnx").unlink()
    student.mkdir()
    RemovalPlan("", (), "none").save(student / "removal.json")
    (student / damaged).write_text("cut sho")
    assert run("compile", model, option, f"{student}{end}", "-o", tmp_path / "x") == 1
    assert re.fullmatch(f"trimtab: error: .*{damaged}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("text", ["no losses", None])
def test_a_file_that_holds_no_losses_is_said_before_the_model_is_exported(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, losses = denoiser(tmp_path / "model"), tmp_path / "losses"
    (tmp_path / "model" / "denoiser.onnx").unlink()
    losses.mkdir() if text is None else losses.write_text(text)
    for command in (
        ("score", model, "-o", losses),
        ("compile", model, "--remove", 0.3, "--scores", losses, "-o", tmp_path / "x"),
    ):
        assert run(*command) == 1
        assert re.fullmatch("trimtab: error: .*losses .*: name another file.*\n", capsys.readouterr().err)


@pytest.mark.usefixtures("in_one_process")
def test_a_switch_that_cannot_be_is_said_before_layers_are_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, small = denoiser(tmp_path / "model"), tmp_path / "small"
    wish = ("--steps", 3, "--remove", 0.3)
    assert run("compile", model, *wish, "--remove-by", "magnitude", "-o", small) == 0
    capsys.readouterr()
    assert run("compile", model, *wish, "--switch", f"{small}@0.01", "-o", tmp_path / "x") == 1
    told = capsys.readouterr().err
    assert "no step would call denoiser" in told and "evaluations" not in told


@pytest.mark.usefixtures("in_one_process")
def test_a_share_of_time_is_of_the_device_and_the_plan_says_how_far_it_got(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = denoiser(tmp_path / "model", 8)
    mine = tmp_path / "mine.toml"
    mine.write_text(
        '[mine]\ntitle = "Mine"\nbackend = "onnxruntime"\nfp32_tflops = 0.1\nbandwidth_gb_s = 10.0\n'
        '[other]\ntitle = "Other"\nbackend = "onnxruntime"\nfp32_tflops = 0.1\nbandwidth_gb_s = 10.0\n'
    )
    losses = tmp_path / "losses"
    command = (
        "compile",
        model,
        "--steps",
        3,
        "--remove",
        0.4,
        "--scores",
        losses,
        "--devices",
        mine,
        "--json",
    )
    time = ("--remove-of", "time", "--target", "mine", "--target", "cpu")
    assert run(*command, *time, "-o", tmp_path / "x") == 0
    said = json.loads(capsys.readouterr().out)["removal"]
    assert said == json.loads((tmp_path / "x" / "removal.json").read_text())
    assert said["measure"] == "time" and said["details"]["device"] == "mine"
    before, after = said["amount"]
    assert said["share"] == 0.4 <= said["reached"] == pytest.approx(1 - after / before)
    assert -1 <= said["rank_correlation"] <= 1 and 4 <= said["details"]["random_sets"] <= 16
    # The random sets' losses are kept with the scores, and the same sets are drawn again.
    known = losses.read_text()
    assert run(*command, *time, "-o", tmp_path / "x") == 0
    again = json.loads(capsys.readouterr().out)["removal"]
    assert again == said and losses.read_text() == known
    assert run("inspect", tmp_path / "x") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "of time on mine, 40.0% asked for" in text and "rank correlation over" in text
    assert run(*command, *time, "--target", "other", "-o", tmp_path / "y") == 1
    assert "several of the targets mine, cpu, other" in capsys.readouterr().err


@pytest.mark.usefixtures("in_one_process")
def test_a_share_that_cannot_be_reached_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, losses = denoiser(tmp_path / "model"), tmp_path / "losses"
    wish = ("--remove", 0.9, "--keep", "h0->h1", "--scores", losses)
    assert run("compile", model, "--steps", 3, *wish, "-o", tmp_path / "x") == 1
    assert "at most 128 can go" in capsys.readouterr().err and not losses.exists()


def test_what_the_export_refuses_is_said_by_the_command_that_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = denoiser(tmp_path / "model")
    assert run("score", model, "--scheduler", "luck", "-o", tmp_path / "losses") == 1
    assert "there is no scheduler 'luck'" in capsys.readouterr().err
    assert not (tmp_path / "losses").exists()


def test_scoring_does_not_import_torch() -> None:
    code = "import sys, trimtab.scoring; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.usefixtures("in_one_process")
def test_a_rival_measures_only_what_it_removes(tmp_path: Path) -> None:
    model, losses = denoiser(tmp_path / "model"), tmp_path / "losses"
    wish = ("--remove", 0.3, "--remove-by", "magnitude", "--scores", losses)
    assert run("compile", model, "--steps", 3, *wish, "-o", tmp_path / "x") == 0
    (name,) = json.loads((tmp_path / "x" / "removal.json").read_text())["removed"]
    assert {json.loads(line)["removed"] for line in losses.read_text().splitlines()[1:]} == {name}


@pytest.mark.usefixtures("in_one_process")
@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (["--start", "a=b", "--start", "a.c=d"], "--start says twice what a.c starts from, with a"),
        (["--start", "w0=w9"], "no module w0 with weights of its own"),
    ],
)
def test_a_start_that_cannot_be_says_why(
    starts: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, bundle = denoiser(tmp_path / "model"), tmp_path / "b"
    wish = ("--remove", 0.3, "--remove-by", "magnitude")
    assert run("compile", model, "--steps", 3, *wish, "-o", bundle) == 0
    command = ("distill", model, "--plan", bundle, "--steps", 1, "--trajectories", 1)
    assert run(*command, *starts, "-o", tmp_path / "x") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give steps or minutes"),
        (["--steps", 0], "steps 0: a finite number above 0 is needed"),
        (["--minutes", "nan"], "minutes nan: a finite number above 0 is needed"),
        (["--steps", 1, "--rate", "inf"], "rate inf: a finite number above 0 is needed"),
        (["--steps", 1, "--trajectories", 0], "0 trajectories to train on were asked for: give 1 or more"),
        (["--steps", 1, "--guidance", "nan"], "the guidance scale nan is not a finite number"),
    ],
)
def test_training_that_cannot_be_is_refused_before_any_work(
    options: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = denoiser(tmp_path / "model")
    (tmp_path / "model" / "denoiser.onnx").unlink()
    RemovalPlan("", (), "none").save(tmp_path / "removal.json")
    command = ("distill", model, "--plan", tmp_path / "removal.json", *options, "-o", tmp_path / "x")
    assert run(*command) == 1
    assert message in capsys.readouterr().err
