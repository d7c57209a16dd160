"""Claim: how much of what captions say is in the pictures, against how fast they are drawn, under inheritance.

    python benchmarks/inherit_quality.py [--bundle PLAIN] [--pictures N] [--skip NAME]... [--every N]...
                                         [--plot FILE.png] [--json] [--scratch FOLDER] [--log FILE]
                                         [--mode NAME]...

The sample's U-Net (samples/01_shapes, trained), 20 steps of DDIM, captions that its training never saw, a third each
with 1, 2 and 3 objects; the same captions and start noise for every row. The score is the share of the stated
attributes that the sample's judge finds, with its standard error. For every skip and interval N: the uniform
schedule; the same with the first two evaluations and the last in full ("dense"); and the schedule that a search takes
at the uniform one's speed (`trimtab.calibration.drift`, on other captions), where that is another one. Speed is by
multiplications of the denoiser; benchmarks/inherit_speed.py holds that against the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.bundle import open_bundle
from trimtab.calibration.course import step_macs
from trimtab.calibration.draft import draft
from trimtab.calibration.drift import UNIFORM, candidates, chosen_of
from trimtab.calibration.journal import add, resume
from trimtab.calibration.ranges import fingerprint
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
SKIPS = (
    *(f"branch {number}" for number in (0, 1, 2, 3)),
    *("layers", "convolution", "self-attention", "cross-attention", "feed-forward"),
)


def measure(
    plain: Path,
    scratch: Path,
    pictures: int,
    skips: Sequence[str],
    intervals: Sequence[int],
    modes: Sequence[str],
    log: Path | None = None,
) -> list[dict[str, Any]]:
    """One row a schedule: its name, its speed and its score; full evaluations first."""
    program = one_schedule(plain)
    table = _Table(program, _Scorer(pictures), scratch, log)
    table.row("full", "full", "", None)
    cells = [(skip, every) for skip in skips for every in intervals]
    uniform = {
        (skip, every): table.row(f"{skip}, every {every}", "uniform", skip, InheritPlan((skip,), every))
        for skip, every in cells
    }
    for skip, every in cells if "searched" in modes else ():
        table.search(f"{skip}, searched as {every}", skip, uniform[skip, every])
    for skip, every in cells if "dense" in modes else ():
        dense = InheritPlan((skip,), every, dense_start=2, dense_end=1)
        table.row(f"{skip}, every {every}, dense", "dense", skip, dense)
    return sorted(table.rows, key=lambda row: (row["skip"] != "", [*skips, ""].index(row["skip"])))


def one_schedule(plain: Path) -> Program:
    """A plain bundle's program with the one task and the one schedule that are measured."""
    program = read_program(open_bundle(plain))
    name, task = next(iter(program.tasks.items()))
    task = dataclasses.replace(task, schedules={SCHEDULE: task.schedules[SCHEDULE]})
    return dataclasses.replace(program, tasks={name: task})


class _Table:
    """The rows, as they are measured; those that a file holds already are taken from there."""

    def __init__(self, program: Program, scorer: _Scorer, scratch: Path, log: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._program, self._scorer, self._scratch, self._log = program, scorer, scratch, log
        self._known: dict[str, dict[str, Any]] = {}
        if log is not None:
            header = {"fingerprint": fingerprint(program), "pictures": scorer.pictures}
            rows = resume(log, header, dict, holds="scores", measured_on="pictures")
            self._known = {row["name"]: row for row in rows}

    def row(self, name: str, kind: str, skip: str, plan: InheritPlan | None, **more: Any) -> dict[str, Any]:
        """One schedule, scored."""
        if name not in self._known:
            ours = partition(self._program if plan is None else inherit(self._program, plan))
            value, error, macs = self._scorer.score(ours, self._scratch / str(len(self.rows)))
            speed = self.rows[0]["macs"] / macs if self.rows else 1.0
            self._keep(
                {"name": name, "kind": kind, "skip": skip, "macs": macs, "speed": speed, "score": value}
                | {"error": error, **more}
            )
        self.rows.append(self._known[name])
        return self.rows[-1]

    def search(self, name: str, skip: str, uniform: dict[str, Any]) -> None:
        """What a search takes at the speed of a uniform schedule; no row where it takes that one."""
        if name not in self._known:
            # A hair below, so that the uniform schedule itself is not rounded out.
            speed = uniform["speed"] * (1 - 1e-9)
            wish = InheritPlan(skip=(skip,), speed=speed, prompts=self._scorer.others)
            found = candidates(self._program, wish, self._scratch / "search")[SCHEDULE]
            best = chosen_of(found)
            by_name = {candidate.name.partition(" ")[0]: candidate.drift for candidate in found}
            more = {"drift": best.drift, "uniform_drift": by_name[UNIFORM]}
            if best.name.startswith(UNIFORM):
                self._keep({"name": name, "kind": "none", **more})
            else:
                pattern = "".join("i" if choice else "F" for choice in best.choices)
                plan = InheritPlan(skip=(skip,), choices={SCHEDULE: best.choices})
                self.row(name, "searched", skip, plan, pattern=pattern, **more)
                return
        if self._known[name]["kind"] != "none":
            self.rows.append(self._known[name])

    def _keep(self, row: dict[str, Any]) -> None:
        self._known[row["name"]] = row
        if self._log is not None:
            add(self._log, row)
        print(json.dumps(row), file=sys.stderr, flush=True)


class _Scorer:
    """Draws the same captions from the same noise with every program, and lets the sample's judge read them."""

    def __init__(self, pictures: int) -> None:
        sys.path.insert(0, str(SAMPLE))
        import judge
        from shapes import sample_scenes

        self._judging, self._judge = judge, judge.load()
        each = pictures // 3
        self._scenes = [scene for n in (1, 2, 3) for scene in sample_scenes(SEED + n, each, n)]
        self.pictures = len(self._scenes)
        few = [sample_scenes(SEED - n, 2, n) for n in (1, 2, 3)]
        self.others = tuple(scene.caption for scenes in zip(*few, strict=True) for scene in scenes)

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


MODES = {"uniform": "every N", "dense": "every N, dense ends", "searched": "searched"}

COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#b9770e", "#7d3c98", "#17a589", "#839192", "#d81b60", "#9acd32")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Score against speed: a colour for what is skipped, a mark for the mode, a bar for the standard error."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, left, right, top, base = 1000, 620, 70, 760, 40, 570
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    last = max(row["speed"] for row in rows) * 1.03
    low = min(row["score"] - row["error"] for row in rows) - 0.005
    high = max(row["score"] + row["error"] for row in rows) + 0.005

    def x(speed: float) -> float:
        return left + (right - left) * (speed - 0.95) / (last - 0.95)

    def y(score: float) -> float:
        return base - (base - top) * (score - low) / (high - low)

    def mark(kind: str, at: tuple[float, float], colour: str) -> None:
        a, b = at
        if kind == "searched":
            pen.ellipse((a - 5, b - 5, a + 5, b + 5), fill=colour)
        elif kind == "dense":
            pen.polygon([(a, b - 6), (a + 6, b + 5), (a - 6, b + 5)], outline=colour, fill="white", width=2)
        else:
            pen.rectangle((a - 5, b - 5, a + 5, b + 5), outline=colour, fill="white", width=2)

    for score in range(round(100 * low), round(100 * high) + 1, 5 if high - low > 0.2 else 1):
        if low <= score / 100 <= high:
            pen.line([(left, y(score / 100)), (right, y(score / 100))], fill="#e5e7e9")
            pen.text((left - 8, y(score / 100)), f"{score}%", fill="black", font=font, anchor="rm")
    for quarter in range(4, round(4 * last) + 1):
        if quarter / 4 <= last:
            pen.line([(x(quarter / 4), top), (x(quarter / 4), base)], fill="#e5e7e9")
            pen.text((x(quarter / 4), base + 8), f"{quarter / 4:g}x", fill="black", font=font, anchor="mt")
    pen.line([(left, top), (left, base), (right, base)], fill="black")
    title = "stated attributes that the judge finds, against speed (by multiplications)"
    pen.text((left, 12), title, fill="black", font=font)
    skips = dict.fromkeys(row["skip"] for row in rows if row["skip"])
    colours = {"": "black", **dict(zip(skips, itertools.cycle(COLOURS), strict=False))}
    for row in rows:
        at, colour = (x(row["speed"]), y(row["score"])), colours[row["skip"]]
        ends = [(at[0], y(row["score"] + sign * row["error"])) for sign in (-1, 1)]
        pen.line(ends, fill=colour)
        mark(row["kind"], at, colour)
    for index, (skip, colour) in enumerate(colours.items()):
        pen.rectangle((right + 20, top + 24 * index, right + 32, top + 24 * index + 12), fill=colour)
        pen.text((right + 42, top + 24 * index + 6), skip or "full", fill="black", font=font, anchor="lm")
    for index, (kind, text) in enumerate(MODES.items(), len(colours) + 1):
        mark(kind, (right + 26, top + 24 * index + 6), "black")
        pen.text((right + 42, top + 24 * index + 6), text, fill="black", font=font, anchor="lm")
    image.quantize(64).save(path, optimize=True)


def _show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'schedule':34}{'speed':>7}{'score':>18}{'drift':>9}{'uniform':>9}  F full, i inherits")
    for row in rows:
        score = f"{row['score']:.2%} ± {row['error']:.2%}"
        drift = f"{row['drift']:9.4f}{row['uniform_drift']:9.4f}" if "drift" in row else " " * 18
        print(f"{row['name']:34}{row['speed']:7.3f}{score:>18}{drift}  {row.get('pattern', '')}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="the sample's plain bundle (default: it is compiled)")
    parser.add_argument("--pictures", type=int, default=300, metavar="N", help="a row (default 300)")
    parser.add_argument("--skip", action="append", metavar="NAME", help="default: every level")
    parser.add_argument("--every", action="append", type=int, metavar="N", help="default: 2, 3, 5")
    parser.add_argument("--mode", action="append", choices=tuple(MODES), help="default: all; uniform always")
    parser.add_argument("--log", type=Path, help="keep rows there, and go on from them")
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
            arguments.skip or SKIPS,
            arguments.every or (2, 3, 5),
            arguments.mode or tuple(MODES),
            arguments.log,
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
