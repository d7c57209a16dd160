"""What bench measures where the system says less, and says where a bundle's process fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trimtab.child import Child
from trimtab.errors import TrimtabError
from trimtab.runtime import bench
from trimtab.runtime.executor import BoundCalls, BoundStep, Plan


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


def test_a_step_is_the_step_alone_and_a_picture_has_the_decoder_where_the_device_works_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, queued = 0.0, 0.0

    def calls(seconds: float) -> BoundCalls:
        def run() -> None:
            nonlocal queued
            queued += seconds

        return BoundCalls((), run, wait)

    def wait() -> None:
        nonlocal clock, queued
        clock, queued = clock + queued, 0.0

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock))
    step = BoundStep((), np.zeros(1), np.zeros(1), calls(2), {})
    plan = Plan((), {}, calls(30), (step,), calls(500))
    pipe: Any = SimpleNamespace(
        prepare=lambda: (None, plan, {}),
        bundle=SimpleNamespace(contents=SimpleNamespace(segments={})),
    )
    drawn = bench._drawn(pipe, {}, one_by_one=False)
    assert (drawn["picture"], drawn["steps"]) == (532, [2])


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (
            "raise RuntimeError('no kernel\\nand so on')",
            r"runs a\.bundle failed \(RuntimeError: no kernel\): run it with",
        ),
        ("os.kill(os.getpid(), 9)", r"runs a\.bundle was killed, .* memory runs out: make room"),
        ("os._exit(3)", r"runs a\.bundle ended with exit code 3: see what it said"),
    ],
)
def test_why_a_bundles_process_failed_is_said_as_it_was(
    fails: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing.py").write_text(
        f"import os\nfrom trimtab.runtime import bench, load\ndef fail(*_, **__):\n    {fails}\n"
        "load.load = fail\nmain = bench.main\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bench, "Child", lambda _: Child("failing"))
    with pytest.raises(TrimtabError, match=message) as raised:
        bench.bench([Path("a.bundle")])
    assert "\n" not in str(raised.value)


def test_a_script_without_a_guard_can_bench(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom trimtab.runtime.bench import bench\n"
        "try:\n    bench([Path('absent.bundle')])\nexcept Exception as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert "absent.bundle is not a folder" in done.stdout and not done.stderr
