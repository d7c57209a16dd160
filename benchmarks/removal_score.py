"""Claim: scoring Stable Diffusion 1.5's U-Net with 16 samples takes 1.3 times its memory, and says early how long.

    python benchmarks/removal_score.py [--model PIPELINE] [--steps 4] [--evaluations 40] [--json] [--scratch FOLDER]

Runs `trimtab score` on 859,520,964 parameters, random weights (fp32, 512x512 pixels, one thread), reads the resident
memory of its processes twice a second, and stops it after some evaluations: a whole run takes hours. What it would take
is what the command itself says, and what the evaluations that were made come to. Memory is told by what was going on:
the export, which has a process of its own, the model's own trajectories, the scores. With 4 steps in the place of 20
the trajectories are shorter; no memory depends on that. Takes 8 GB of disk and 6 GB of memory; --model takes a pipeline
in the place of making one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import models

MEMORY_GOAL = 1.3
LINE_GOAL_S = 60.0
SAMPLES = 16
_POLL_S = 0.5


def resident(process: int) -> tuple[int, int]:
    """Bytes that a process holds, and those of them that are no mapped file's."""
    status = Path(f"/proc/{process}/status").read_text()
    numbers = [int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 for name in ("VmRSS", "RssAnon")]  # type: ignore[index]
    return numbers[0], numbers[1]


def processor_seconds(process: int) -> float:
    """Of a process and of those that it has waited for."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def children(process: int) -> list[int]:
    """Processes that it waits for."""
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def measure(model: Path, scratch: Path, steps: int, evaluations: int) -> dict[str, Any]:
    """Runs the command until it has made some evaluations, and says what it took."""
    log = scratch / "losses"
    command = [sys.executable, "-m", "trimtab", "score", str(model), "--samples", str(SAMPLES)]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, "--steps", str(steps), "-o", str(log)], stderr=subprocess.PIPE, text=True
    )
    said: list[tuple[float, float, str]] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if " info: " in line:
                passed, used = time.monotonic() - start, processor_seconds(process.pid)
                said.append((passed, used, line.strip().partition(" info: ")[2]))

    threading.Thread(target=listen, daemon=True).start()
    peaks: dict[str, list[int]] = {}
    when: list[float] = []
    while process.poll() is None and len(when) < evaluations:
        lines = len(log.read_text().splitlines()) if log.exists() else 0
        try:
            others = children(process.pid)
            now = tuple(map(sum, zip(*map(resident, [process.pid, *others]), strict=True)))
        except (OSError, TypeError):  # one of them has just ended
            time.sleep(_POLL_S)
            continue
        phase = "scores" if lines else "export" if others else "trajectories"
        peaks[phase] = [max(pair) for pair in zip(now, peaks.get(phase, (0, 0)), strict=True)]
        when += [time.monotonic() - start] * max(0, lines - 1 - len(when))
        time.sleep(_POLL_S)
    if process.poll() is not None:
        raise SystemExit(f"trimtab score ended by itself with {process.returncode}: look at what it said")
    process.send_signal(signal.SIGTERM)
    process.wait()
    # Losses come by the chunk, each behind one more evaluation of the whole model.
    chunks = sorted(set(when))
    each = (chunks[-1] - chunks[0]) / (len(when) - when.count(chunks[0])) if len(chunks) > 1 else None
    unet = next((model / "unet").glob("*.safetensors")).stat().st_size
    jobs = int(re.search(r"then (\d+) evaluations", said[0][2])[1])  # type: ignore[index]
    top = max(peak[0] for peak in peaks.values())
    return {
        "model_bytes": unet,
        "peak_bytes": {name: {"resident": peak[0], "own": peak[1]} for name, peak in peaks.items()},
        "memory_ratio": top / unet,
        "said": [{"seconds": passed, "processor_seconds": used, "line": line} for passed, used, line in said],
        "line_seconds": said[0][0],
        "evaluations": len(when),
        "evaluation_seconds": each,
        "all_scores_hours": each and each * jobs / 3600,
        "goals": {"memory_ratio": MEMORY_GOAL, "line_seconds": LINE_GOAL_S},
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "command": " ".join(["python", *sys.argv]),
    }


def _show(result: dict[str, Any]) -> None:
    whole = result["model_bytes"]
    for name, peak in result["peak_bytes"].items():
        print(
            f"{name:14}{peak['resident'] / 1e6:9.0f} MB at most, {peak['own'] / 1e6:.0f} of the process's own: "
            f"{peak['resident'] / whole:.2f} times the model's {whole / 1e6:.0f} MB (goal: {MEMORY_GOAL})"
        )
    for entry in result["said"]:
        print(
            f"after {entry['seconds']:5.0f} s ({entry['processor_seconds']:.0f} s of processors): {entry['line']}"
        )
    print(f"the first line after {result['line_seconds']:.0f} s (goal: {LINE_GOAL_S:.0f})")
    if result["evaluation_seconds"]:
        each, hours = result["evaluation_seconds"], result["all_scores_hours"]
        print(f"{result['evaluations']} evaluations, {each:.1f} s each: all scores in {hours:.1f} h")
    print(f"{result['cores']} cores, load average {result['load_average']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a pipeline with a U-Net of this size (default: one is made)"
    )
    parser.add_argument(
        "--part", choices=("unet", "narrow"), default="unet", help="narrow: a small one, a check"
    )
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="of the trajectories (default 4)")
    parser.add_argument("--evaluations", type=int, default=40, metavar="N", help="to stop after (default 40)")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        model = options.model
        if model is None:
            model = Path(folder) / "pipeline"
            models.make(model, options.part)
        result = measure(model, Path(folder), options.steps, options.evaluations)
    if options.json:
        print(json.dumps(result))
    else:
        _show(result)


if __name__ == "__main__":
    main()
