"""Claim: with 30 and 50% of Stable Diffusion 1.5's U-Net removed, a step and its memory are less, and the engine too.

    python benchmarks/removal_speed.py [--pipeline FOLDER] [--of parameters|bytes|time] [--by magnitude] [--rounds N]
        [--threads N] [--skip-engines] [--json] [--scratch FOLDER]

The U-Net has 859,520,964 parameters, random weights, fp32; a step is two guidance rows of 4x64x64 latents and 77 tokens
on the CPU in ONNX Runtime. The whole one and the two smaller ones take turns, step by step, each in a process of its
own, so that memory is its own. The ratios are of processor time, which other work on the machine disturbs least with
one thread; the clock's are in --json. Beside them stands what the multiplications predict (`trimtab.targets.cost`), and
the bytes of real TensorRT-RTX engines in FP16, which need no GPU (`benchmarks/build.py`).

Layers are chosen by the magnitude of their weights, or as --by says: time depends on which layers go and not on the
numbers in those that stay, so that no losses are measured here. Another choice of the same share has other times.
Takes 13 GB of disk and of memory; --pipeline takes what `models.py` made before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import models
from step import GUIDANCE, SCHEDULE, between, compiled, conditions, counted, process, serve, spread, told

SHARES = (0.3, 0.5)
TARGET = "rtx-4090"


def steps_of(connection: Connection, bundle: str, threads: int) -> None:
    """Steps of a bundle."""
    from trimtab.runtime.load import load

    with load(bundle, threads=threads) as pipe:
        request, plan, _ = pipe.prepare("a red circle", seed=0, guidance=GUIDANCE)
        plan.begin(request)
        plan.steps[0].run(request)  # memory is touched
        serve(connection, lambda turn: plan.steps[turn % SCHEDULE].run(request), {})


def write_plan(plain: Path, file: Path, share: float, by: str, measure: str) -> None:
    """Writes which layers of the plain bundle's denoiser make up a share."""
    from trimtab.bundle import open_bundle
    from trimtab.calibration.choice import Wish
    from trimtab.calibration.planning import chosen, measure_of
    from trimtab.passes.candidates import Candidates
    from trimtab.passes.removal import RemovalPlan
    from trimtab.storage import read_program
    from trimtab.targets.device import find_device

    program = read_program(open_bundle(plain))
    candidates = Candidates(program.segments["denoiser"].model)
    wish = Wish(share, of=measure, device=find_device(TARGET), precision="fp16")
    with tempfile.TemporaryDirectory() as folder:
        names = chosen(candidates, wish, by, {}, 0, measure_of(program, wish, Path(folder)))
    RemovalPlan(candidates.fingerprint, names, by).save(file)


def engine_bytes(bundle: Path, scratch: Path | None) -> int:
    """Of the denoiser's real engine in FP16."""
    script = Path(__file__).with_name("build.py")
    command = [sys.executable, str(script), "--bundle", str(bundle), "--target", TARGET, "--json"]
    command += ["--scratch", str(scratch)] if scratch else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return int(json.loads(done.stdout)["built"]["bytes"])


def measure(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compiles the bundles below ``scratch``, lets their steps take turns, and says what was found."""
    source = options.pipeline
    if source is None:
        models.make(source := scratch / "pipeline", options.part)
    plain = compiled(source, scratch / "plain.bundle")
    bundles = {"whole": plain}
    for share in SHARES:
        name = f"{share:.0%} removed"
        removal = scratch / f"{share}.json"
        # In a process of its own, whose memory is gone before anything is measured.
        command = [sys.executable, __file__, "--plain", str(plain), "--write", str(removal)]
        command += ["--share", str(share), "--by", options.by, "--of", options.of]
        subprocess.run(command, check=True)
        bundles[name] = compiled(source, scratch / f"{share}.bundle", "--removal-plan", str(removal))
    rows = {name: _Row(counted(bundle)) for name, bundle in bundles.items()}
    with (
        process(steps_of, str(bundles["whole"]), options.threads) as whole,
        process(steps_of, str(bundles["30% removed"]), options.threads) as third,
        process(steps_of, str(bundles["50% removed"]), options.threads) as half,
    ):
        connections = dict(zip(rows, (whole, third, half), strict=True))
        for connection in connections.values():
            connection.recv()
        for _ in range(options.rounds):
            for name, connection in connections.items():
                connection.send(True)
                rows[name].answers.append(connection.recv())
    engines = {name: None if options.skip_engines else engine_bytes(bundles[name], scratch) for name in rows}
    return {
        "rows": {
            name: row.result(rows["whole"], engines[name], engines["whole"]) for name, row in rows.items()
        },
        "by": options.by,
        "of": options.of,
        "threads": options.threads or "one a core",
        **conditions(options.rounds),
    }


class _Row:
    """What one bundle's process said, and what its steps count."""

    def __init__(self, counts: dict[str, Any]) -> None:
        self.counts = counts
        self.answers: list[dict[str, float]] = []

    def median(self, what: str) -> float:
        return spread([answer[what] for answer in self.answers])["median"]

    def result(self, whole: _Row, engine: int | None, whole_engine: int | None) -> dict[str, Any]:
        return {
            **self.counts,
            "removed": 1 - self.counts["parameters"] / whole.counts["parameters"],
            "processor_seconds": spread([answer["processor"] for answer in self.answers]),
            "seconds": spread([answer["seconds"] for answer in self.answers]),
            "peak_bytes": self.answers[-1]["peak_bytes"],
            "time_ratio": self.median("processor") / whole.median("processor"),
            "clock_ratio": self.median("seconds") / whole.median("seconds"),
            "macs_ratio": self.counts["macs"][0] / whole.counts["macs"][0],
            "memory_ratio": self.answers[-1]["peak_bytes"] / whole.answers[-1]["peak_bytes"],
            "engine_bytes": engine,
            "engine_ratio": engine / whole_engine if engine and whole_engine else None,
        }


def _show(result: dict[str, Any]) -> None:
    print(
        f"{'':13}{'removed':>8}{'processor s':>13}{'[min .. max]':>18}{'ratio':>7}{'MACs':>7}{'peak MB':>9}"
        f"{'ratio':>7}{'engine MB':>11}{'ratio':>7}"
    )
    for name, row in result["rows"].items():
        used = row["processor_seconds"]
        engine = f"{row['engine_bytes'] / 1e6:11.1f}{row['engine_ratio']:7.3f}" if row["engine_bytes"] else ""
        print(
            f"{name:13}{row['removed']:8.1%}{used['median']:13.2f}{between(used):>18}{row['time_ratio']:7.3f}"
            f"{row['macs_ratio']:7.3f}{row['peak_bytes'] / 1e6:9.0f}{row['memory_ratio']:7.3f}{engine}"
        )
    print(f"of {result['of']}, by {result['by']}, {told(result)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, help="of `models.make` (default: one is made)")
    parser.add_argument("--of", choices=("parameters", "bytes", "time"), default="parameters")
    parser.add_argument("--by", choices=("magnitude", "random"), default="magnitude")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="steps of each (default 3)")
    parser.add_argument(
        "--part", choices=("unet", "narrow"), default="unet", help="narrow: a small one, a check"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each; 0: one a core")
    parser.add_argument("--skip-engines", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_plan(options.plain, options.write, options.share, options.by, options.of)
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        result = measure(Path(folder), options)
    if options.json:
        print(json.dumps(result))
    else:
        _show(result)


if __name__ == "__main__":
    main()
