"""The command line as others script against it: exit codes, one line on errors, JSON, and nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import foreign
import numpy as np
import pytest
from PIL import Image

from trimtab.__main__ import main as command
from trimtab.bundle import open_bundle
from trimtab.calibration.draft import draft
from trimtab.cli import main
from trimtab.export import source
from trimtab.program import Schedule
from trimtab.storage import read_program

pytestmark = pytest.mark.xdist_group("dit")

COMMANDS = ("compile", "build", "run", "bench", "compare", "inspect", "devices")


@pytest.fixture
def bundle(bundle_folder: Callable[[str], Path]) -> Path:
    return bundle_folder("dit")


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must fail with one line on stderr; gives the line."""
    assert main([str(a) for a in arguments]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("trimtab: error:")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


def succeeds(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Runs a command with --json; gives its object."""
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "example:\n  trimtab" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "x", "--size", "12"],
        ["compile", "x"],
        ["run", "b", "-o", "x.png", "--seed", "a"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_inspect_tells_what_the_contract_promises(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = succeeds(capsys, "inspect", bundle)
    assert result["schema"] == 1
    names = {segment["name"] for segment in result["segments"]}
    assert names == {"denoiser", "vae_decoder"}
    for segment in result["segments"]:
        assert segment["parameters"] > 0 and segment["weight_bytes"] >= 4 * segment["parameters"]
        assert [(e["target"], e["backend"]) for e in segment["engines"]] == [("cpu", "onnxruntime")]
        assert all(e["bytes"] > segment["weight_bytes"] for e in segment["engines"])
    assert [(s["name"], s["steps"]) for s in result["schedules"]] == [("ddim-20", 20), ("ddim-3", 3)]
    assert result["schedules"][1]["calls"] == [["denoiser"]] * 3
    assert [p["name"] for p in result["passes"]] == ["FuseSampler"]
    assert {tuple(sorted(file)) for file in result["files"]} == {("bytes", "path", "sha256")}


@pytest.mark.parametrize("command", ["inspect", "devices", "compare", "bench"])
def test_tables_are_for_people(command: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"devices": [], "compare": [bundle, bundle], "bench": [bundle, "--rounds", "1"]}.get(
        command, [bundle]
    )
    assert main([command, *map(str, arguments)]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 1


def test_brackets_in_names_are_shown_and_are_no_markup(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "[" / "red]").mkdir(parents=True)
    (tmp_path / "[" / "red]" / "a[bold].bundle").symlink_to(bundle)
    path = tmp_path / "[" / "red]" / "a[bold].bundle"
    assert main(["bench", str(path), "--rounds", "1"]) == 0
    assert str(path)[-20:] in capsys.readouterr().out


def test_a_line_break_in_a_name_leaves_an_error_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "a\\nb is not a folder" in fails(capsys, "inspect", tmp_path / "a\nb")


def test_a_bundle_is_not_compiled_again(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is a bundle, compiled already" in fails(capsys, "compile", bundle, "-o", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_run_writes_a_picture_that_carries_its_settings(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "x.png"
    result = succeeds(capsys, "run", bundle, "--class", 3, "--seed", 7, "--schedule", "ddim-3", "-o", out)
    assert result["images"] == [str(out)]
    with Image.open(out) as image:
        assert image.size == (64, 64)
        assert image.text["seed"] == "7" and image.text["class"] == "3" and image.text["schedule"] == "ddim-3"  # type: ignore[attr-defined]


def test_several_pictures_are_numbered_and_floats_go_to_npy(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["run", bundle, "--class", 3, "--seed", 7, "--schedule", 3, "-n", 2, "-o"]
    result = succeeds(capsys, *common, tmp_path / "x.png")
    assert [Path(p).name for p in result["images"]] == ["x-0.png", "x-1.png"]
    succeeds(capsys, *common, tmp_path / "x.npy")
    pixels = np.load(tmp_path / "x.npy")
    assert pixels.shape == (2, 64, 64, 3) and pixels.dtype == np.float32
    for index in range(2):
        with Image.open(tmp_path / f"x-{index}.png") as image:
            assert np.abs(np.asarray(image) / 255 - pixels[index]).max() <= 0.5 / 255 + 1e-6


def test_a_seed_that_was_not_given_is_told_and_makes_the_picture_again(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = succeeds(capsys, "run", bundle, "--class", 3, "--schedule", 3, "-o", tmp_path / "a.npy")
    seed = first["settings"]["seed"]
    succeeds(capsys, "run", bundle, "--class", 3, "--schedule", 3, "--seed", seed, "-o", tmp_path / "b.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


def test_compare_of_a_bundle_with_itself_is_zero(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = succeeds(capsys, "compare", bundle, bundle, "--schedule", "ddim-3")
    assert result["steps"] == [0, 0, 0] and result["picture"] == 0
    errors = {module["name"]: module["error"] for module in result["modules"]}
    assert errors["transformer_blocks.1.attn1"] == 0


def test_compare_of_different_schedules_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(name: str, change: Callable[[Schedule], Schedule], new: str) -> Path:
        program = read_program(open_bundle(bundle))
        task_name, task = next(iter(program.tasks.items()))
        changed = dataclasses.replace(task, schedules={new: change(task.schedules["ddim-3"])})
        draft(dataclasses.replace(program, tasks={task_name: changed}), tmp_path / name).close()
        return tmp_path / name

    def noisy(schedule: Schedule) -> Schedule:
        steps = tuple(dataclasses.replace(step, draws=("discard",)) for step in schedule.steps)
        return dataclasses.replace(schedule, steps=steps)

    renamed = other("renamed", lambda schedule: schedule, "euler-3")
    assert "ddim-3 and euler-3" in fails(capsys, "compare", bundle, renamed, "--schedule", "3")
    drawing = other("drawing", noisy, "ddim-3")
    assert "other noise" in fails(capsys, "compare", bundle, drawing, "--schedule", "3")


def test_compare_of_bundles_that_do_other_things_is_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = read_program(open_bundle(bundle))
    (task,) = program.tasks.values()
    unasked = tuple(spec for spec in task.inputs if spec.source.get("kind") != "label")
    blind = {"unconditional": dataclasses.replace(task, inputs=unasked)}
    draft(dataclasses.replace(program, tasks=blind), tmp_path / "blind").close()
    told = fails(capsys, "compare", bundle, tmp_path / "blind")
    assert told.endswith("blind unconditional: compare bundles of one pipeline")


def test_a_bundle_that_bench_cannot_load_is_said(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = bundle.with_name("absent.bundle")
    assert f"{absent} is not a folder" in fails(capsys, "bench", bundle, "--against", absent, "--rounds", 1)


def test_bench_measures_two_bundles_in_turn(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = succeeds(capsys, "bench", bundle, "--against", bundle, "--rounds", 2)
    assert len(result["bundles"]) == 2 and result["step_ratio"] > 0
    for entry in result["bundles"]:
        assert entry["peak_bytes"] > 0 and entry["step_ms"] > 0
        assert {s["name"]: s["calls"] for s in entry["segments"]} == {"denoiser": 20, "vae_decoder": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "1", "--schedule", "euler-9"], "it has ddim-20, ddim-3"),
        (["--class", "1", "--size", "65x64"], "64x64"),
        (["--prompt", "a cat"], "does not read any"),
        (["--class", "1000"], "0 to 999"),
        (["--class", "-1"], "0 to 999"),
        (["--class", "1", "--image", "x.png"], "cannot do image-to-image"),
        (["--class", "1", "--mask", "x.png"], "without a picture"),
        (["--class", "1", "--guidance", "nan"], "finite"),
        (["--class", "1", "--guidance", "1e300"], "of 32 bits"),
        (["--class", "1", "--threads", "-1"], "-1 threads"),
        (["--class", "1", "--threads", "100000"], "up to 1024"),
        (["--class", "1", "--strength", "0.5"], "without a picture"),
        (["--class", "1", "--target", "orin-nano-8gb"], "no engines for orin-nano-8gb"),
        (["--class", "1", "-n", "0"], "one or more"),
        (["--class", "1", "-n", str(10**15)], "ask for fewer at a time"),
        (["--class", "1", "--seed", str(2**64)], "seed"),
        ([], "give label="),
    ],
)
def test_a_request_that_cannot_be_met_fails_with_one_line(
    arguments: list[str], message: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "run", bundle, *arguments, "-o", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_goes_nowhere_it_does_not_fit(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ".png or .npy" in fails(capsys, "run", bundle, "--class", 1, "-o", tmp_path / "x.gif")
    (tmp_path / "d.png").mkdir()
    assert "is a folder" in fails(capsys, "run", bundle, "--class", 1, "-o", tmp_path / "d.png")
    long = fails(capsys, "run", bundle, "--class", 1, "-o", tmp_path / f"{300 * 'x'}.png")
    assert "File name too long" in long and "fault" not in long


def test_pictures_that_are_no_pictures_fail_with_one_line(
    bundle_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    common = ["run", bundle_folder("sd15"), "--prompt", "x", "-o", tmp_path / "o.png", "--image"]
    assert "cannot be read as a picture" in fails(capsys, *common, tmp_path / "text.png")
    assert "does not exist" in fails(capsys, *common, tmp_path / "nothing.png")


# ---- compile: bad input leaves nothing behind ----


def compile_fails(capsys: pytest.CaptureFixture[str], model: object, tmp_path: Path, *more: object) -> str:
    place = tmp_path / "place"
    place.mkdir(exist_ok=True)
    line = fails(capsys, "compile", model, "-o", place / "b.bundle", *more)
    assert not list(place.iterdir()), "something was left behind"
    return line


@pytest.fixture
def damaged(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A pipeline that a test may damage."""
    return Path(shutil.copytree(pipeline_folder("ddpm"), tmp_path / "ddpm"))


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in compile_fails(capsys, tmp_path / "nothing", tmp_path)
    assert "model_index.json" in compile_fails(capsys, tmp_path, tmp_path)


def test_a_hub_id_without_a_network_fails_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    assert "the network" in compile_fails(capsys, "someone/some-model", tmp_path)


def test_of_a_hub_s_weights_those_that_are_read_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    unet, text = "unet/diffusion_pytorch_model", "text_encoder/model"
    read = [f"{unet}.safetensors", f"{text}.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    shards = [f"transformer/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    others = [f"{unet}.fp16.safetensors", f"{unet}.non_ema.safetensors", "v1-5-pruned.safetensors"]
    others += ["transformer/diffusion_pytorch_model.fp16-00001-of-00001.safetensors", "unet/lora.safetensors"]
    asked: dict[str, Any] = {}

    def information(_: Any, model: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        asked.update(listed=(model, revision))
        names = [*read, *shards, *others, "unet/config.json"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def download(model: str, *, revision: str | None, **options: Any) -> str:
        asked.update(options, downloaded=(model, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", information)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert source.find("someone/some-model@v1.5") == tmp_path
    assert asked["listed"] == asked["downloaded"] == ("someone/some-model", "v1.5")
    assert source.find("someone/some-model") == tmp_path
    assert asked["listed"] == asked["downloaded"] == ("someone/some-model", None)
    assert {name for name in asked["ignore_patterns"] if name.endswith(".safetensors")} == set(others)


def test_a_damaged_index_is_refused_with_what_is_wrong_in_it(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((damaged / "model_index.json").read_text())
    for entry in ([], ["diffusers"], "UNet2DModel"):
        (damaged / "model_index.json").write_text(json.dumps(index | {"unet": entry}))
        assert "DDPMPipeline needs one" in compile_fails(capsys, damaged, tmp_path)
    (damaged / "model_index.json").write_text("{")
    assert "model_index.json cannot be read" in compile_fails(capsys, damaged, tmp_path)


def test_an_unsupported_pipeline_class_is_answered_with_the_supported_ones(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((damaged / "model_index.json").read_text())
    (damaged / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanPipeline"}))
    line = compile_fails(capsys, damaged, tmp_path)
    assert "WanPipeline is not supported" in line and "StableDiffusionXLPipeline" in line


def test_absent_cut_and_pickled_weights(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "cut short" in compile_fails(capsys, damaged, tmp_path)
    for header in (b"[]", b'{"w": []}', b'{"w": {"data_offsets": []}}'):
        weights.write_bytes(len(header).to_bytes(8, "little") + header)
        assert "is not a safetensors file" in compile_fails(capsys, damaged, tmp_path)
    weights.write_bytes(data[:5])
    assert "cut short" in compile_fails(capsys, damaged, tmp_path)
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    assert "safe_serialization" in compile_fails(capsys, damaged, tmp_path)
    weights.with_name("diffusion_pytorch_model.bin").unlink()
    assert "no weight file" in compile_fails(capsys, damaged, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "rtx-409"], "there is no device"),
        (["--scheduler", "dimm"], "did you mean ddim"),
        (["--scheduler", "flow-euler"], "flow-matching"),
        (["--steps", "0"], "from 1"),
        (["--steps", "4", "--steps", "4"], "twice"),
        (["--size", "15x16"], "multiples of 2"),
        (["--precision", "fp4"], "fp4"),
        (["--recipe", "nothing.toml"], "nothing.toml does not exist: give a TOML file"),
        (["--inherit", "nothing.json"], "nothing.json: the file does not exist"),
        (["--inherit", "0"], "inherit 0: a whole number from 1, or a TOML or JSON file"),
        (["--inherit", "-1"], "inherit -1: a whole number from 1, or a TOML or JSON file"),
    ],
)
def test_options_that_cannot_be_met(
    arguments: list[str], message: str, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in compile_fails(capsys, damaged, tmp_path, *arguments)


def test_what_is_no_bundle_is_not_overwritten(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "diary.txt").write_text("dear diary")
    assert "exists" in fails(capsys, "compile", damaged, "-o", precious)
    assert (precious / "diary.txt").read_text() == "dear diary"


def test_a_full_disk_leaves_nothing_and_the_old_bundle_stays(
    copied_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.weights import WeightStore

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(WeightStore, "keep", full)
    foreign.write(tmp_path / "denoiser.onnx", *foreign.LINEAR)
    model = tmp_path / "model.toml"
    model.write_text(foreign.PIXELS)
    assert "is full" in fails(capsys, "compile", model, "-o", copied_bundle)
    assert [p.name for p in copied_bundle.parent.iterdir() if "partial" in p.name] == []
    assert main(["inspect", str(copied_bundle)]) == 0


INTERRUPTED = "trimtab: error: interrupted: nothing was written"


def test_ctrl_c_while_modules_are_imported_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Importing(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "trimtab.cli", Importing("trimtab.cli"))
    assert command() == 1
    assert capsys.readouterr().err.strip() == INTERRUPTED


def test_ctrl_c_while_a_text_is_executed_is_exit_code_1_and_no_signal(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "import sys, trimtab.cli as cli; from trimtab.__main__ import main\n"
        "cli._devices = lambda arguments: exec('raise KeyboardInterrupt')\n"
        "sys.exit(main())\n"
    )
    arguments = [sys.executable, "-m", "module", "devices"]
    done = subprocess.run(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, INTERRUPTED)


@pytest.mark.parametrize("moment", ["while it starts", "while it writes", "while another process exports"])
def test_ctrl_c_leaves_nothing(damaged: Path, tmp_path: Path, moment: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", "compile", str(damaged), "-o", str(place / "b.bundle")]
        + (["--remove", "0.3"] if "exports" in moment else []),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background deaf to Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        start_new_session=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and maps.exists() and "numpy" not in maps.read_text():
        time.sleep(0.02)  # until then it is Python that starts, and on a busy machine that may take long
    time.sleep(0.5)
    while moment != "while it starts" and process.poll() is None and not list(place.iterdir()):
        time.sleep(0.02)
    if "exports" in moment:
        time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.strip() == INTERRUPTED
    assert out == ""
    assert not list(place.iterdir())
