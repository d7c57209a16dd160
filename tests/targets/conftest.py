"""A TensorRT that is not there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import NANO, ORIN, Fake, rebuilt

from trimtab.targets import preflight
from trimtab.targets.preflight import Machine


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Installs a TensorRT that behaves as it is told; gives a function that reads its calls."""

    def install(*endings: str, **told: Any) -> Callable[[], list[Any]]:
        folder = tmp_path / "site"
        (folder / "tensorrt").mkdir(parents=True, exist_ok=True)
        for name in ("__init__", "plugin"):
            source = "fake_tensorrt" if name == "__init__" else "fake_tensorrt_plugin"
            shutil.copyfile(Path(__file__).parent / f"{source}.py", folder / "tensorrt" / f"{name}.py")
        behaviour = {"version": "10.3.0.30", "strongly_typed_only": False, "unknown": []} | told
        (folder / "behaviour.json").write_text(json.dumps(behaviour | {"endings": endings or ["engine"]}))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        calls = folder / "calls.jsonl"
        calls.write_text("")
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()]

    yield install
    sys.modules.pop("tensorrt", None)


@pytest.fixture(scope="session")
def for_jetson(bundle_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as a workstation compiles it for an Orin Nano. To be read only."""
    folder = tmp_path_factory.mktemp("jetson") / "b"
    shutil.copytree(bundle_folder("dit"), folder)
    rebuilt(folder, "cpu", NANO)
    return folder


@pytest.fixture
def folder(for_jetson: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(for_jetson, tmp_path / "b"))


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """Makes this machine another."""
    return lambda machine: monkeypatch.setattr(preflight, "look", lambda backend: machine)


@pytest.fixture
def orin(fake: Fake, at: Callable[[Machine], None]) -> Callable[[], int]:
    """This machine is an Orin with a TensorRT; gives how many engines it was asked for."""
    calls = fake()
    at(ORIN)
    return lambda: sum(call[0] == "build" for call in calls())
