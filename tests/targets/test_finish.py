"""trimtab build: what is made on the device, what is kept, and what is refused before anything is made."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import NANO, ORIN, Fake, engines_for, whole

from trimtab.bundle import MANIFEST, open_bundle, update_manifest
from trimtab.cli import main
from trimtab.errors import (
    MissingDependency,
    TargetError,
    WrongDevice,
)
from trimtab.storage import with_engines
from trimtab.targets import finish
from trimtab.targets.device import find_device
from trimtab.targets.finish import Report, build
from trimtab.targets.preflight import Machine
from trimtab.targets.wanted import with_target

pytestmark = pytest.mark.xdist_group("dit")


def made(report: Report) -> list[tuple[str, str]]:
    return [(engine.segment, engine.reason) for engine in report.made]


def changed(folder: Path, segment: str, **fields: Any) -> None:
    """Changes what the bundle says of an engine for the Orin."""
    contents = open_bundle(folder).contents
    engines = {
        name: [
            dataclasses.replace(e, **fields) if (name, e.target) == (segment, NANO) else e for e in s.engines
        ]
        for name, s in contents.segments.items()
    }
    update_manifest(folder, with_engines(contents, engines))


def test_a_device_builds_the_graphs_that_were_made_for_it(folder: Path, orin: Callable[[], int]) -> None:
    graphs = {name: engine.graph for name, engine in engines_for(folder).items()}
    report = build(folder, cache=None)
    assert made(report) == [(name, "it was not built yet") for name in graphs]
    assert (report.kept, dict(report.skipped), orin()) == (len(graphs), {}, len(graphs))  # kept: cpu's
    for name, engine in engines_for(folder).items():
        assert engine.built and (engine.version, engine.sm) == ("10.3.0.30", "8.7")
        assert engine.path == f"engines/{NANO}/{name}.engine" and engine.graph == graphs[name]
        assert (folder / engine.path).read_bytes() == b"an engine" and engine.bytes == 9
        assert engine.activation_bytes == 4096 and engine.shapes
    again = build(folder, cache=None)
    assert made(again) == [] and again.kept == 2 * len(graphs) and orin() == len(graphs)


def test_a_device_needs_no_torch_and_no_onnxscript(folder: Path, fake: Fake) -> None:
    fake()
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnxscript", "diffusers", "transformers", "scipy"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, {str(folder.parent / "site")!r})
from trimtab.cli import main
from trimtab.targets import preflight
preflight.look = lambda backend: preflight.Machine(*{dataclasses.astuple(ORIN)!r})
sys.exit(main(["build", {str(folder)!r}, "--no-cache", "--target", {NANO!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(engine.built for engine in engines_for(folder).values())


# ---- refreshed ----


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"version": "10.3.0.26"}, "TensorRT 10.3.0.26 built it and 10.3.0.30 is installed"),
        ({"sm": "8.6"}, f"it was built for compute capability 8.6 and {NANO} has 8.7"),
    ],
)
def test_an_engine_of_another_version_or_gpu_is_refreshed(
    folder: Path, orin: Callable[[], int], fields: dict[str, str], reason: str
) -> None:
    build(folder, [NANO], cache=None)
    changed(folder, "denoiser", **fields)
    assert made(build(folder, [NANO], cache=None)) == [("denoiser", reason)]
    assert engines_for(folder)["denoiser"].version == "10.3.0.30"
    assert engines_for(folder)["denoiser"].path == f"engines/{NANO}/denoiser-2.engine"
    assert not (folder / f"engines/{NANO}/denoiser.engine").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"an enginE")])
def test_a_damaged_engine_is_made_again(
    folder: Path, orin: Callable[[], int], damage: Callable[[Path], None]
) -> None:
    build(folder, [NANO], cache=None)
    damage(folder / engines_for(folder)["denoiser"].path)
    assert made(build(folder, [NANO], cache=None)) == [("denoiser", "its file was missing or damaged")]
    whole(folder)


def test_of_two_jetsons_of_one_chip_only_the_one_at_hand_is_built(
    folder: Path, orin: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    update_manifest(folder, with_target(open_bundle(folder).contents, find_device("orin-nx-16gb")))
    monkeypatch.setattr(finish, "recognise", lambda devices: devices["orin-nx-16gb"])
    report = build(folder, cache=None)
    assert {engine.target for engine in report.made} == {"orin-nx-16gb"}
    assert report.skipped == {NANO: "this machine is orin-nx-16gb"}


# ---- refused before anything is built ----


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"backend_version": None}, MissingDependency, "apt-get install python3-libnvinfer"),
        ({"jetpack": "6.1"}, TargetError, r"JetPack 6\.1 and orin-nano-8gb needs 6\.2 or 7\.2: flash"),
        ({"sm": "8.9", "gpu": "RTX 4090"}, WrongDevice, r"8\.7 and this machine's RTX 4090 has 8\.9"),
        ({"free_bytes": 1000}, TargetError, r"0\.0 GiB of memory are free and .* GiB are needed"),
    ],
)
def test_a_machine_that_will_not_do_is_refused_with_the_way_out(
    folder: Path,
    fake: Fake,
    at: Callable[[Machine], None],
    change: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    calls, before = fake(), (folder / MANIFEST).read_bytes()
    at(dataclasses.replace(ORIN, **change))
    with pytest.raises(error, match=words):
        build(folder, [NANO], cache=None)
    assert calls() == [] and (folder / MANIFEST).read_bytes() == before
    report = build(folder, cache=None)  # of itself it builds what it can, and says what it left out
    assert made(report) == [] and list(report.skipped) == [NANO]


def test_without_a_gpu_the_answer_is_the_device(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(folder), "--target", NANO]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "with JetPack 6.2 or 7.2, and this machine has no NVIDIA GPU" in said


def test_a_builder_that_is_not_installed_is_named_by_its_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "tensorrt_rtx" else find(name, *a)
    )
    assert main(["build", str(folder), "--target", "rtx-4090"]) == 1
    assert "pip install 'trimtab[rtx]'" in capsys.readouterr().err


def test_an_unknown_device_is_told_the_nearest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(folder), "--target", "orin-nano-9gb"]) == 1
    assert "did you mean orin-nano-8gb" in capsys.readouterr().err


def test_a_bundle_for_other_machines_says_why_nothing_is_built(folder: Path, fake: Fake, at: Any) -> None:
    contents = open_bundle(folder).contents
    update_manifest(
        folder,
        with_engines(contents, {n: s.engines[1:] for n, s in contents.segments.items()}),
    )
    fake()
    at(dataclasses.replace(ORIN, sm="11.0", gpu="Thor"))
    with pytest.raises(TargetError, match=r"no target that can be built here \(orin-nano-8gb: .*Thor has 11"):
        build(folder)


# ---- targets that the bundle does not have yet ----


def test_a_further_jetson_takes_the_graphs_of_the_first(folder: Path) -> None:
    contents = with_target(open_bundle(folder).contents, find_device("agx-thor"))
    for segment in contents.segments.values():
        first, second = (engine for engine in segment.engines if engine.backend == "tensorrt")
        assert (second.target, second.sm, second.built) == ("agx-thor", "11.0", False)
        assert (second.graph, second.shapes, second.precision) == (
            first.graph,
            first.shapes,
            first.precision,
        )


def test_a_further_backend_takes_the_sizes_that_are_there_and_graphs_that_are_not_lowered(
    folder: Path,
) -> None:
    contents = with_target(open_bundle(folder).contents, find_device("rtx-4090"))
    for segment in contents.segments.values():
        jetson, new = segment.engines[-2:]
        assert new.shapes == jetson.shapes and new.graph == segment.graph != jetson.graph
        assert (new.target, new.backend, new.sm, new.built) == ("rtx-4090", "tensorrt_rtx", "8.9", False)


def test_an_rtx_is_added_without_a_gpu_and_shares_what_is_there(
    copied_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    command = ["build", str(copied_bundle), "--cache", str(tmp_path / "cache"), "--json"]
    assert main([*command, "--target", "rtx-4090", "--target", "rtx-4070"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {engine["target"] for engine in result["made"]} == {"rtx-4090", "rtx-4070"}
    first = engines_for(copied_bundle, "rtx-4090")
    for name, engine in engines_for(copied_bundle, "rtx-4070").items():
        assert engine == dataclasses.replace(first[name], target="rtx-4070")
        assert engine.version == trt.__version__ and engine.bytes > 1000
    assert len(list((tmp_path / "cache" / "entries").iterdir())) == len(first)
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["made"] == [] and result["skipped"] == {} and result["kept"] == 3 * len(first)
