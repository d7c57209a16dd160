"""With low memory, one stage's engines are there at a time, and what was let go of is gone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trimtab
from trimtab.runtime.sessions.onnxruntime import OnnxRuntimeCpu


@pytest.mark.xdist_group("dit")
def test_engines_of_earlier_stages_are_gone(
    bundle_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[str, weakref.ref[Any]] = {}
    load = OnnxRuntimeCpu.load

    def watched(self: OnnxRuntimeCpu, engine: Any, path: Path, plugins: Any = ()) -> Any:
        gc.collect()
        there = [name for name, session in alive.items() if session() is not None]
        assert there == [], f"{there} still hold their weights when {path.stem} is loaded"
        session = load(self, engine, path, plugins)
        alive[path.stem] = weakref.ref(session._session)
        return session

    with trimtab.load(bundle_folder("dit")) as pipe:
        whole = pipe(label=1, seed=0, schedule=3).pixels
    monkeypatch.setattr(OnnxRuntimeCpu, "load", watched)
    with trimtab.load(bundle_folder("dit"), low_memory=True) as pipe:
        for _ in range(2):
            assert np.array_equal(pipe(label=1, seed=0, schedule=3).pixels, whole)
    assert len(alive) >= 2, "one stage proves nothing"
