"""Where the command line's result goes: streams that are full or closed, late signals, and the working folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import foreign
import pytest
from test_cli import fails, succeeds

from trimtab.cli import main

OWN_DEVICE = """
[own]
title = "Mon garçon"
backend = "onnxruntime"
"""


def test_a_signal_after_the_result_changes_no_exit_code(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "import atexit, os, signal, sys; from trimtab.__main__ import main\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"  # what is registered last runs first
        "sys.exit(main())\n"
    )
    for arguments, code in (["devices", "--json"], 0), (["inspect", "nothing"], 1):
        done = subprocess.run(
            [sys.executable, "-m", "module", *arguments], cwd=tmp_path, stderr=subprocess.PIPE
        )
        assert (done.returncode, done.stderr.count(b"\n")) == (code, code), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_result_that_nobody_can_take_is_one_line(form: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trimtab", "devices", *form],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "cannot be written to stdout (No space left on device)" in line


def test_closed_streams_are_no_fault() -> None:
    for closed, code in (">&-", 0), ("2>&-", 0), ("<&-", 0):
        command = f'"{sys.executable}" -m trimtab devices {closed}'
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, "")


def test_a_name_that_stdout_has_no_letters_for_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN_DEVICE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", "devices", "--devices", tmp_path / "own.toml"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"") and rb"gar\xe7on" in done.stdout


def test_bench_says_what_its_process_could_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "bench", tmp_path / ("x" * 300), "--rounds", 1)
    assert "File name too long" in line and "memory" not in line


def test_the_working_folder_can_become_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign.write(tmp_path / "denoiser.onnx", *foreign.LINEAR)
    (tmp_path / "model.toml").write_text(foreign.PIXELS)
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    assert succeeds(capsys, "compile", tmp_path / "model.toml", "-o", ".", "--steps", 2)["bundle"] == "."
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "b"]) == 0
