"""The checks for machines with a GPU, on one without: what is skipped and why, what fails, and what is written."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trimtab.runtime.load

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_checks

    return gpu_checks


@pytest.fixture
def gpu(checks: Any) -> Any:
    """A machine that has everything."""
    versions = dict.fromkeys(checks.PACKAGES, "1.0")
    return checks.Machine(
        gpu="Null GPU", sm="8.9", memory_bytes=8 << 30, driver="1", cuda="12.6", versions=versions
    )


@pytest.fixture
def prepared(checks: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Nothing is compiled and every check gives numbers; says which backends were to be built."""
    wanted: list[list[str]] = []
    monkeypatch.setattr(checks, "buildable", lambda machine, devices: dict.fromkeys(checks.TARGETS, ""))

    def compile_samples(folder: Path, devices: Path, names: list[str], end: float) -> dict[str, Path]:
        wanted.append(names)
        return {"plain": folder}

    monkeypatch.setattr(checks, "compile_samples", compile_samples)
    monkeypatch.setattr(checks, "isolated", lambda check, bundles, left: {"step_ms": 2.0})
    return wanted


def run(checks: Any, machine: Any, folder: Path) -> tuple[int, dict[str, Any]]:
    code = checks.main(["-o", str(folder / "out.json")], lambda: machine)
    return code, json.loads((folder / "out.json").read_text())


def results(said: dict[str, Any]) -> list[str]:
    return [finding["result"] for finding in said["findings"]]


def test_without_a_gpu_all_is_skipped_with_the_reason(
    checks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = checks.Machine(why_none="there is no NVIDIA driver here", versions={"torch": "2.13"})
    code, said = run(checks, machine, tmp_path)
    assert code == 0
    assert results(said) == ["skipped"] * len(checks.CHECKS)
    shown = capsys.readouterr().out
    for name in checks.CHECKS:
        assert f"{name:18} skipped  there is no NVIDIA driver here" in shown
    assert "no NVIDIA GPU; torch 2.13" in shown


def test_this_machine_is_asked_without_an_error(checks: Any) -> None:
    machine = checks.look()
    assert machine.versions["numpy"]
    assert (machine.gpu is None) == bool(machine.why_none)


def test_what_is_not_installed_is_skipped_with_the_extra(
    checks: Any, gpu: Any, prepared: list[list[str]], tmp_path: Path
) -> None:
    versions = {name: v for name, v in gpu.versions.items() if name not in ("tensorrt", "triton")}
    code, said = run(checks, dataclasses.replace(gpu, versions=versions), tmp_path)
    assert code == 0
    assert results(said) == ["ok", "ok", "skipped", "skipped"]
    assert "trimtab[tensorrt]" in said["findings"][2]["why"] and "triton" in said["findings"][3]["why"]
    assert prepared == [["tensorrt_rtx"]]


def test_what_cannot_be_built_for_this_gpu_is_skipped(
    checks: Any, gpu: Any, prepared: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = {"tensorrt_rtx": "not for 9.0", "tensorrt": ""}
    monkeypatch.setattr(checks, "buildable", lambda machine, devices: reasons)
    code, said = run(checks, gpu, tmp_path)
    assert (code, results(said)) == (0, ["ok", "skipped", "ok", "ok"])
    assert said["findings"][1]["why"] == "not for 9.0"
    assert prepared == [["tensorrt"]]


def test_a_check_that_fails_is_named_and_is_the_exit_code(
    checks: Any,
    gpu: Any,
    prepared: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = iter([{"step_ms": 4.0}, {"step_ms": 2.0}, {"why": "its process died"}, {"error": 1e-3}])
    monkeypatch.setattr(checks, "isolated", lambda check, bundles, left: next(answers))
    code, said = run(checks, gpu, tmp_path)
    assert (code, results(said)) == (1, ["ok", "ok", "failed", "ok"])
    shown = capsys.readouterr().out
    assert "step / ONNX Runtime's 0.50" in shown and "failed   its process died" in shown


def test_a_model_that_cannot_be_compiled_fails_what_draws_and_nothing_else(
    checks: Any, gpu: Any, prepared: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(checks, "compile_samples", broken)
    code, said = run(checks, gpu, tmp_path)
    assert (code, results(said)) == (1, ["failed", "failed", "failed", "ok"])
    assert said["findings"][0]["why"] == "the sample model: no room"


def test_this_gpu_is_a_target_of_both_tensorrts(checks: Any, gpu: Any, tmp_path: Path) -> None:
    from trimtab.targets.device import find_device

    (tmp_path / "devices.toml").write_text(checks.device_rows(gpu))
    for backend, name in checks.TARGETS.items():
        device = find_device(name, tmp_path / "devices.toml")
        assert (device.backend, device.sm, device.memory_bytes) == (backend, "8.9", 8 << 30)


@pytest.mark.parametrize(
    ("check", "given", "said"),
    [
        (dict, {"step_ms": 1.0}, {"step_ms": 1.0}),
        (int, "x", {"why": "ValueError: invalid literal for int() with base 10: 'x'"}),
        (os._exit, 3, {"why": "its process died (exit code 3)"}),
        (time.sleep, 60, {"why": "not done in the 1 s that were left"}),
    ],
)
def test_whatever_becomes_of_a_check_is_an_answer(check: Any, given: Any, said: Any, checks: Any) -> None:
    seconds = 1.0 if check is time.sleep else 60.0
    assert checks.isolated(check, given, seconds) == said


@pytest.mark.xdist_group("shapes-sd")
def test_a_picture_is_measured(
    checks: Any, sample_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the GPU's place: all but the backend is what runs on a GPU."""
    load = trimtab.runtime.load.load
    monkeypatch.setattr(trimtab.runtime.load, "load", lambda bundle, **where: load(bundle, target="cpu"))
    monkeypatch.setattr(checks, "step_ms", lambda pipe: 1.0)
    bundles = {"plain": sample_bundle("shapes-sd"), "again": sample_bundle("shapes-sd")}
    numbers = checks.picture(bundles, "cuda")
    off = {"plain": 0.0, "again": 0.0}
    assert numbers == {"off_cpu": off, "repeats": True, "step_ms": 1.0, "not_finite_is_seen": True}


@pytest.mark.parametrize("off", [9 / 255, float("nan")])
def test_a_picture_that_is_too_far_off_is_named(checks: Any, off: float) -> None:
    assert checks.too_far({"a": 1e-6, "b": 7 / 255}, {"a": 2 / 255, "b": 8 / 255}) is None
    assert "picture of b" in checks.too_far({"a": 1e-6, "b": off}, {"a": 2 / 255, "b": 8 / 255})


@pytest.mark.xdist_group("dit")
def test_what_is_drawn_is_what_the_model_reads(checks: Any, bundle_folder: Callable[[str], Path]) -> None:
    with trimtab.load(bundle_folder("dit")) as pipe:
        assert checks.asked(pipe) == {"seed": 0, "label": 1}


def test_kernels_that_were_compiled_elsewhere_need_no_triton(
    checks: Any, gpu: Any, prepared: list[list[str]], tmp_path: Path
) -> None:
    machine = dataclasses.replace(gpu, versions={"torch": "2.13"})
    findings = checks.run_all(machine, {}, tmp_path, tmp_path / "kernels.json")
    assert [finding.result for finding in findings] == ["skipped"] * 3 + ["ok"]
    assert checks.run_all(machine, {}, tmp_path)[3].result == "skipped"


@pytest.mark.xdist_group("dit")
def test_the_time_of_a_step_is_measured(checks: Any, bundle_folder: Callable[[str], Path]) -> None:
    with trimtab.load(bundle_folder("dit")) as pipe:
        assert 0 < checks.step_ms(pipe, pictures=1) < 10_000
