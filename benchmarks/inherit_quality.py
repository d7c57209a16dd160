"""Claim: how much of what captions say is in the pictures, against how fast they are drawn, under inheritance.

    python benchmarks/inherit_quality.py [--bundle PLAIN] [--pictures N] [--skip NAME]... [--every N]...
                                         [--plot FILE.png] [--json] [--scratch FOLDER]

The sample's U-Net (samples/01_shapes, trained), 20 steps of DDIM, captions that its training never saw, a third each
with 1, 2 and 3 objects; the same captions and start noise for every row. The score is the share of the stated
attributes that the sample's judge finds, with its standard error. For every skip and interval N the uniform
schedule, and the one that `trimtab.calibration.drift` finds for the same speed: by least summed drift ("searched"),
and what it would take ("chosen": the better of both by the drift of its last latents). Speed is by multiplications
of the denoiser; benchmarks/inherit_speed.py holds that against the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.bundle import open_bundle
from trimtab.calibration.draft import draft
from trimtab.calibration.drift import Candidate, candidates, step_macs
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import InheritPlan
from trimtab.passes.partition import partition
from trimtab.program import Program
from trimtab.storage import read_program

SAMPLE = Path(__file__).parents[1] / "samples" / "01_shapes"
STEPS = 20
SCHEDULE = f"ddim-{STEPS}"
GUIDANCE = 5.0
SEED = 9100
BATCH = 50


def measure(
    plain: Path, scratch: Path, pictures: int, skips: Sequence[str], intervals: Sequence[int]
) -> list[dict[str, Any]]:
    """One row a schedule: its name, its speed and its score; full evaluations first."""
    program = read_program(open_bundle(plain))
    name, task = next(iter(program.tasks.items()))
    task = dataclasses.replace(task, schedules={SCHEDULE: task.schedules[SCHEDULE]})
    program = dataclasses.replace(program, tasks={name: task})
    scorer = _Scorer(pictures)
    count = 0

    def row(name: str, skip: str, plan: InheritPlan | None, **more: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        ours = partition(program if plan is None else inherit(program, plan))
        value, error, macs = scorer.score(ours, scratch / str(count))
        print(f"{name:28} {value:.2%} ± {error:.2%}", file=sys.stderr, flush=True)
        return {"name": name, "skip": skip, "macs": macs, "score": value, "error": error, **more}

    full = row("full", "", None, kind="full", speed=1.0)
    rows = [full]
    for skip in skips:
        for every in intervals:
            uniform = row(
                f"{skip}, every {every}", skip, InheritPlan(skip=(skip,), every=every), kind="uniform"
            )
            uniform["speed"] = full["macs"] / uniform["macs"]
            rows.append(uniform)
            # A hair below, so that the uniform schedule itself is not rounded out.
            wish = InheritPlan(skip=(skip,), speed=uniform["speed"] * (1 - 1e-9))
            found = candidates(program, wish, scratch / "search")[SCHEDULE]
            chosen = min(found, key=lambda candidate: (candidate.drift, candidate.macs))
            for candidate in found:
                if candidate.name == "searched":
                    rows.append(_searched(row, skip, candidate, every, full["macs"]))
                else:
                    uniform["drift"] = candidate.drift
                (rows[-1] if candidate.name == "searched" else uniform)["chosen"] = candidate is chosen
    return rows


def _searched(row: Any, skip: str, candidate: Candidate, every: int, full: int) -> dict[str, Any]:
    plan = InheritPlan(skip=(skip,), choices={SCHEDULE: candidate.choices})
    result: dict[str, Any] = row(
        f"{skip}, searched as {every}", skip, plan, kind="searched", drift=candidate.drift
    )
    result["speed"] = full / result["macs"]
    result["pattern"] = "".join("i" if choice else "F" for choice in candidate.choices)
    return result


class _Scorer:
    """Draws the same captions from the same noise with every program, and lets the sample's judge read them."""

    def __init__(self, pictures: int) -> None:
        sys.path.insert(0, str(SAMPLE))
        import judge
        from shapes import sample_scenes

        self._judging, self._judge = judge, judge.load()
        each = pictures // 3
        self._scenes = [scene for n in (1, 2, 3) for scene in sample_scenes(SEED + n, each, n)]

    def score(self, program: Program, folder: Path) -> tuple[float, float, int]:
        """Share of the stated attributes, its standard error, and the multiplications of one trajectory."""
        pixels, macs = [], 0
        with draft(program, folder) as pipe:
            for start in range(0, len(self._scenes), BATCH):
                part = self._scenes[start : start + BATCH]
                options: dict[str, Any] = {
                    "prompt": [scene.caption for scene in part],
                    "guidance": GUIDANCE,
                    "seed": [SEED + start + n for n in range(len(part))],
                }
                pixels.append(pipe(**options).pixels)
            _, plan, _ = pipe.prepare(self._scenes[0].caption, guidance=GUIDANCE, seed=0)
            known = {id(step.calls): step for step in plan.steps}
            one = {key: step_macs(pipe, step.calls) for key, step in known.items()}
            macs = sum(one[id(step.calls)] for step in plan.steps)
        overall = self._judging.score(self._judge, np.concatenate(pixels), self._scenes).overall
        return float(overall.value), float(overall.error), macs


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Score against speed: a dot and its standard error a row; uniform and searched of one skip share a colour."""
    from PIL import Image, ImageDraw

    width, height, left, base, top = 720, 440, 70, 390, 30
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    last = max(row["speed"] for row in rows) * 1.05
    low = min(row["score"] - row["error"] for row in rows) - 0.01
    high = max(row["score"] + row["error"] for row in rows) + 0.01

    def x(speed: float) -> float:
        return left + (width - left - 20) * (speed - 0.9) / (last - 0.9)

    def y(score: float) -> float:
        return base - (base - top) * (score - low) / (high - low)

    pen.line([(left, top), (left, base), (width - 20, base)], fill="black")
    for step in range(5):
        score, speed = low + (high - low) * step / 4, 1 + (last - 1) * step / 4
        pen.text((8, y(score) - 6), f"{score:.1%}", fill="black")
        pen.text((x(speed) - 12, base + 6), f"{speed:.2f}x", fill="black")
    pen.text((left, 8), "stated attributes found, against speed (by multiplications)", fill="black")
    colours = dict(
        zip(
            dict.fromkeys(row["skip"] for row in rows),
            ("black", "#c0392b", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#616a6b"),
            strict=False,
        )
    )
    for row in rows:
        at, colour = (x(row["speed"]), y(row["score"])), colours[row["skip"]]
        pen.line(
            [(at[0], y(row["score"] - row["error"])), (at[0], y(row["score"] + row["error"]))], fill=colour
        )
        box = (at[0] - 4, at[1] - 4, at[0] + 4, at[1] + 4)
        if row["kind"] == "searched":
            pen.ellipse(box, fill=colour)
        else:
            pen.rectangle(box, outline=colour, width=2)
    for index, (skip, colour) in enumerate(colours.items()):
        pen.text((width - 200, top + 14 * index), skip or "full evaluations", fill=colour)
    pen.text((width - 200, top + 14 * len(colours)), "square: uniform, dot: searched", fill="black")
    image.save(path, optimize=True)


def _show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'schedule':28}{'speed':>7}{'score':>18}{'drift':>9}  searched: F full, i inherits")
    for row in rows:
        score = f"{row['score']:.2%} ± {row['error']:.2%}"
        drift = f"{row['drift']:.4f}" if "drift" in row else ""
        mark = " *" if row.get("chosen") else ""
        print(f"{row['name']:28}{row['speed']:7.3f}{score:>18}{drift:>9}  {row.get('pattern', '')}{mark}")
    print("* what `speed = S` would take")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="the sample's plain bundle (default: it is compiled)")
    parser.add_argument("--pictures", type=int, default=300, metavar="N", help="a row (default 300)")
    parser.add_argument("--skip", action="append", metavar="NAME", help="default: branch 0, branch 1")
    parser.add_argument("--every", action="append", type=int, metavar="N", help="default: 2, 3, 5")
    parser.add_argument("--plot", type=Path, help="also draw a plot to this PNG")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch, plain = Path(folder), arguments.bundle
        if plain is None:
            plain = scratch / "plain.bundle"
            command = [sys.executable, "-m", "trimtab", "compile", str(SAMPLE / "models" / "shapes-sd")]
            command += ["--steps", str(STEPS), "-o", str(plain)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (scratch / "search").mkdir()
        rows = measure(
            plain,
            scratch,
            arguments.pictures,
            arguments.skip or ("branch 0", "branch 1"),
            arguments.every or (2, 3, 5),
        )
    if arguments.plot:
        plot(rows, arguments.plot)
    if arguments.json:
        print(
            json.dumps({"rows": rows, "pictures": arguments.pictures, "steps": STEPS, "guidance": GUIDANCE})
        )
    else:
        _show(rows)


if __name__ == "__main__":
    main()
