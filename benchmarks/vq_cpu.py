"""Claim: on the CPU a packed DiT-XL/2 takes a sixth of the dense one's memory, and at most 1.15 times its time.

    python benchmarks/vq_cpu.py DENSE.bundle PACKED.bundle [--rounds 3] [--steps 3] [--threads 2] [--fast] [--json]

Both bundles draw 256x256 pixels, 256 tokens a row, with guidance: two rows. Each is a process of its own, and they take
turns: a round is a few steps of each. Memory is the process's at the most, from /proc, and with it what of it is the
process's alone: the rest are pages of mapped files, which the system may take back. The time is the median step's, with
its share of what runs before the first.
--fast adds the packed bundle decoded at load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

MEMORY_GOAL, TIME_GOAL = 1 / 6, 1.15

_RUN = """
import json, sys, time
from pathlib import Path
from trimtab.runtime.load import load

def status(*names):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) * 1024 for name in names]

with load(sys.argv[1], target="cpu", threads=int(sys.argv[3]), fast=sys.argv[4] == "fast") as pipe:
    task = pipe.bundle.contents.tasks[pipe.tasks[0]]
    kinds = {spec.source.get("kind") for spec in task.inputs}
    what = {"label": 207} if "label" in kinds else {"prompt": "a red circle"}
    request, plan, _ = pipe.prepare(seed=0, guidance=4.0, **what)
    for turn in iter(sys.stdin.readline, ""):
        start = time.perf_counter()
        plan.begin(request)
        share = (time.perf_counter() - start) / len(plan.steps)
        times = []
        for step in plan.steps[: int(sys.argv[2])]:
            start = time.perf_counter()
            step.run(request)
            times.append(time.perf_counter() - start + share)
        peak, alone = status("VmHWM", "RssAnon")
        print(json.dumps({"times": times, "peak_bytes": peak, "own_bytes": alone}), flush=True)
"""


class _Run:
    """A process that draws when it is told to."""

    def __init__(self, bundle: Path, steps: int, threads: int, fast: bool) -> None:
        self.times: list[float] = []
        self.last: dict[str, Any] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUN, bundle, str(steps), str(threads), "fast" if fast else "packed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self, keep: bool) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.last = json.loads(self._process.stdout.readline())
        if keep:
            self.times += self.last["times"]

    def end(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        return {
            "seconds": statistics.median(self.times),
            "peak_bytes": self.last["peak_bytes"],
            "own_bytes": self.last["own_bytes"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fast", action="store_true", help="the packed bundle decoded at load as well")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = {
        "dense": _Run(options.dense, options.steps, options.threads, False),
        "packed": _Run(options.packed, options.steps, options.threads, False),
    }
    if options.fast:
        runs["fast"] = _Run(options.packed, options.steps, options.threads, True)
    for number in range(options.rounds + 1):
        for run in runs.values():
            run.turn(keep=number > 0)  # the first one allocates
    result = {name: run.end() for name, run in runs.items()}
    memory = result["packed"]["peak_bytes"] / result["dense"]["peak_bytes"]
    seconds = result["packed"]["seconds"] / result["dense"]["seconds"]
    if options.json:
        print(json.dumps(result | {"memory_ratio": memory, "time_ratio": seconds}))
        return
    for name, row in result.items():
        print(
            f"{name:<8}{row['seconds']:>8.2f} s a step{row['peak_bytes'] / 1e6:>10.0f} MB at the most, "
            f"{row['own_bytes'] / 1e6:.0f} of the process's own"
        )
    print(f"memory  1/{1 / memory:.2f} (goal: 1/{1 / MEMORY_GOAL:g})")
    print(f"time    {seconds:.3f} (goal: {TIME_GOAL})")
    print(f"load average {os.getloadavg()[0]:.1f}, {options.threads} threads")


if __name__ == "__main__":
    main()
