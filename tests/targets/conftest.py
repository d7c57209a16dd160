"""A TensorRT that is not there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Fake = Callable[..., Callable[[], list[Any]]]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Installs a TensorRT that behaves as it is told; gives a function that reads its calls."""

    def install(*endings: str, **told: Any) -> Callable[[], list[Any]]:
        folder = tmp_path / "site"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(Path(__file__).parent / "fake_tensorrt.py", folder / "tensorrt.py")
        behaviour = {"version": "10.3.0.30", "strongly_typed_only": False, "unknown": []} | told
        (folder / "behaviour.json").write_text(json.dumps(behaviour | {"endings": endings or ["engine"]}))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        calls = folder / "calls.jsonl"
        calls.write_text("")
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()]

    yield install
    sys.modules.pop("tensorrt", None)
