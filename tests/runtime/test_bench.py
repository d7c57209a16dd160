"""What bench measures where the system says less."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trimtab.runtime import bench


def test_memory_is_measured_by_what_the_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    of_proc = bench.peak_bytes()
    assert of_proc is not None and of_proc > 10e6

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    counted = bench.peak_bytes()
    assert counted is not None and counted > 10e6
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert bench.peak_bytes() is None
