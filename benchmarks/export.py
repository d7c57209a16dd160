"""Claim: compiling Stable Diffusion 1.5 takes little memory beside its U-Net, and its weights no more disk.

    python benchmarks/export.py [--half] [--json] [--scratch FOLDER]

Writes a pipeline of that size with random weights (text encoder 123 M, VAE 84 M, U-Net 860 M parameters,
fp32, or FP16 with --half), runs `python -m trimtab compile` on it as a child and prints its seconds, its peak memory
(the kernel's count of resident pages, those of mapped files among them) against 1.5 times the largest component in
fp32 + 1 GB, what of it is the process's own (on Linux: what no file could give back), and the bundle's bytes against
the weights' in fp32 (goal: at most 1.02 times). Takes 12 GB of disk, given back at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import models

ALLOWANCE = 1_000_000_000
"""Bytes beside the weights: torch, diffusers and the exporter themselves take about half of it."""

FACTOR = 1.5
BUNDLE_GOAL = 1.02


def measure(scratch: Path, part: str, half: bool) -> dict[str, Any]:
    """Compiles a pipeline below ``scratch`` and says what it took."""
    source, bundle = scratch / "pipeline", scratch / "pipeline.bundle"
    models.make(source, part, half=half)
    components = {
        p.name: disk_bytes(p, "*.safetensors") * (2 if half else 1)
        for p in source.iterdir()
        if list(p.glob("*.safetensors"))
    }
    largest, weights = max(components.values()), sum(components.values())
    start = time.perf_counter()
    command = [sys.executable, "-m", "trimtab", "compile", str(source), "-o", str(bundle)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    own = _Own(child.pid)
    own.start()
    _, status, usage = os.wait4(child.pid, 0)  # this child's peak alone, not that of all children
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"trimtab compile failed with {child.returncode}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": peak,
        "own_bytes": own.peak,
        "component_bytes": components,
        "peak_ratio": peak / (FACTOR * largest + ALLOWANCE),
        "bundle_ratio": disk_bytes(bundle, "*") / weights,
        "goals": {"peak_ratio": 1.0, "bundle_ratio": BUNDLE_GOAL},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "onnx-ir")},
    }


class _Own(threading.Thread):
    """Watches a process's own memory until it has ended; ``peak`` is its most, in bytes, 0 where nothing says it."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._status = Path(f"/proc/{process}/status")

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while found := re.search(r"RssAnon:\s+(\d+) kB", self._status.read_text()):
                self.peak = max(self.peak, 1024 * int(found[1]))
                time.sleep(0.02)


def disk_bytes(folder: Path, pattern: str = "*") -> int:
    """What the files of a folder take whose names fit a pattern."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def _show(result: dict[str, Any]) -> None:
    largest = max(result["component_bytes"].values())
    allowed = FACTOR * largest + ALLOWANCE
    print(
        f"compile              {result['seconds']:9.1f} s   ({result['cpu_seconds']:.1f} s of processor time)"
    )
    print(f"peak memory          {result['peak_bytes'] / 1e6:9.1f} MB")
    print(f"of that its own      {result['own_bytes'] / 1e6:9.1f} MB")
    print(f"largest component    {largest / 1e6:9.1f} MB")
    print(f"1.5 x largest + 1 GB {allowed / 1e6:9.1f} MB  ratio {result['peak_ratio']:.3f} (goal: 1)")
    print(f"bundle / weights     {result['bundle_ratio']:9.4f}     (goal: {BUNDLE_GOAL})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part", choices=("whole", "none"), default="whole", help="none: a tiny one, as a check"
    )
    parser.add_argument("--half", action="store_true", help="a pipeline whose files are in FP16")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        result = measure(Path(folder), arguments.part, arguments.half)
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(result)


if __name__ == "__main__":
    main()
