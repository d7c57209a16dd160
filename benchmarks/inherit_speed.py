"""Claim: inheritance at the outermost branch draws 20 steps 1.5 times as fast (every 2nd in full), 1.85 (every 3rd).

    python benchmarks/inherit_speed.py [--pipeline FOLDER] [--rounds N] [--threads N] [--json] [--scratch FOLDER]

Stable Diffusion 1.5's U-Net (859,520,964 parameters, random weights, fp32), two guidance rows of 4x64x64 latents,
77 tokens, on the CPU in ONNX Runtime: a plain bundle, and the same program with `--inherit`. Three kinds of step
take turns, each measured: a plain one, a full one that keeps its features, one that inherits. 20 steps' worth is
put together from their medians (every 2nd: 10 full and 10 inheriting; every 3rd: 7 and 13) and is not drawn: both
plans cut the same segments, so one inheriting bundle serves both. Beside it stands what the multiplications of
every call predict (`trimtab.targets.cost`). The ratio is of processor time, which other work on the machine
disturbs least with one thread; the clock's is printed too. Each bundle has a process of its own, so that memory
is its own. Takes 11 GB of disk and 10 GB of memory; --pipeline
takes what `models.py` made before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import models
from step import GUIDANCE, SCHEDULE, between, compiled, conditions, counted, process, serve, spread, told

GOALS = {2: 1.5, 3: 1.85}
"""Every N-th step in full -> how many times as fast."""

GOAL_OF_PREDICTION = 0.95
"""Of what the multiplications predict."""


def steps_of(connection: Connection, bundle: str, threads: int) -> None:
    """Steps of a bundle, a full one and an inheriting one in turn."""
    from trimtab.runtime.load import load

    with load(bundle, threads=threads) as pipe:
        request, plan, _ = pipe.prepare("a red circle", seed=0, guidance=GUIDANCE)

        plan.begin(request)
        for index in (0, 1):  # memory is touched and kernels are packed
            plan.steps[index].run(request)
        # `serve` counts from 1: an odd turn is a full step, an even one inherits.
        serve(connection, lambda turn: plan.steps[(turn + 1) % 2].run(request), {})


def measure(scratch: Path, source: Path | None, part: str, rounds: int, threads: int) -> dict[str, Any]:
    """Compiles both bundles below ``scratch``, lets their steps take turns, and says what was found."""
    if source is None:
        models.make(source := scratch / "pipeline", part)
    plain = compiled(source, scratch / "plain.bundle")
    ours = compiled(source, scratch / "inheriting.bundle", "--inherit", "2")
    before, after = counted(plain), counted(ours)
    seconds: dict[str, list[float]] = {"plain": [], "full": [], "inherit": []}
    processor: dict[str, list[float]] = {name: [] for name in seconds}
    peaks: dict[str, int] = {}
    with (
        process(steps_of, str(plain), threads) as first,
        process(steps_of, str(ours), threads) as second,
    ):
        for connection in (first, second):
            connection.recv()
        for _ in range(rounds):
            for name, bundle, connection in (
                ("plain", "plain", first),
                ("full", "inheriting", second),
                ("inherit", "inheriting", second),
            ):
                connection.send(True)
                answer = connection.recv()
                seconds[name].append(answer["seconds"])
                processor[name].append(answer["processor"])
                peaks[bundle] = answer["peak_bytes"]
    macs = {"plain": before["macs"][0], "full": after["macs"][0], "inherit": after["macs"][1]}
    speeds = []
    for every, goal in GOALS.items():
        full = len(range(0, SCHEDULE, every))
        counts = {"full": full, "inherit": SCHEDULE - full}

        def faster(cost: dict[str, float], counts: dict[str, int] = counts) -> float:
            return SCHEDULE * cost["plain"] / sum(n * cost[name] for name, n in counts.items())

        measured, predicted = faster(_medians(processor)), faster({k: float(v) for k, v in macs.items()})
        speeds.append(
            {
                "every": every,
                **counts,
                "speed": measured,
                "speed_by_the_clock": faster(_medians(seconds)),
                "predicted": predicted,
                "of_prediction": measured / predicted,
                "goal": goal,
            }
        )
    return {
        "speeds": speeds,
        "goal_of_prediction": GOAL_OF_PREDICTION,
        "processor_seconds": {name: spread(values) for name, values in processor.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "macs": macs,
        "weight_bytes": {"plain": before["weight_bytes"], "inheriting": after["weight_bytes"]},
        "peak_bytes": peaks,
        "threads": threads or "one a core",
        **conditions(rounds),
    }


def _medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(numbers) for name, numbers in values.items()}


def _show(result: dict[str, Any]) -> None:
    print(f"{'step':9}{'processor s':>12}{'[min .. max]':>20}{'clock s':>10}{'GMACs':>9}")
    for name, used in result["processor_seconds"].items():
        clock, macs = result["seconds"][name]["median"], result["macs"][name] / 1e9
        print(f"{name:9}{used['median']:12.2f}{between(used):>20}{clock:10.2f}{macs:9.1f}")
    for row in result["speeds"]:
        print(
            f"every {row['every']}: {row['full']} full + {row['inherit']} inheriting of {SCHEDULE}: "
            f"{row['speed']:.3f} times as fast (goal {row['goal']}), by the clock {row['speed_by_the_clock']:.3f}; "
            f"MACs predict {row['predicted']:.3f}: {row['of_prediction']:.1%} of it "
            f"(goal {result['goal_of_prediction']:.0%})"
        )
    for name, count in result["weight_bytes"].items():
        print(
            f"{name:11} {count / 1e6:9.1f} MB of weights, {result['peak_bytes'][name] / 1e6:9.1f} MB at most"
        )
    print(told(result))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, help="of `models.make` (default: one is made)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="steps of each kind (default 3)")
    parser.add_argument("--part", choices=("unet", "none"), default="unet", help="none: a tiny one, a check")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each; 0: one a core")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        result = measure(
            Path(folder), arguments.pipeline, arguments.part, arguments.rounds, arguments.threads
        )
    print(json.dumps(result)) if arguments.json else _show(result)


if __name__ == "__main__":
    main()
