"""Claim: distillation brings back most of what removing half of a denoiser costs; two kinds of features and a rival.

    python benchmarks/removal_distill.py --work FOLDER [--steps 250] [--pictures 1002] [--only PLAN:FEATURES[:data] ...]

FOLDER is that of removal_quality.py, whose plans are trained. All rows have the same number of optimizer steps. Those
without ":data" have the same batches and no pictures: captions and the teacher's own trajectories. Those with it are
trained on the sample's drawn scenes and their captions, as `trimtab distill --data` does. Prints the share of stated
attributes that the judge finds, with standard errors; rows are kept in FOLDER/distilled.jsonl, and those of the same
budget that are there already are not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import judged
import onnx_ir as ir
import torch

import trimtab
from trimtab.calibration.batches import Batches, Trajectories
from trimtab.calibration.distill import Budget, distill
from trimtab.calibration.draft import draft
from trimtab.calibration.noising import noising_of
from trimtab.calibration.pictures import Pictures, captioned
from trimtab.calibration.trajectories import own_requests, record
from trimtab.export.source import Source
from trimtab.passes.removal import load_plan, remove_layers
from trimtab.passes.student import put_back, save_weights
from trimtab.storage import read_program

ROWS = ("output-loss-0.5:normalized", "output-loss-0.5:plain", "bk-sdm-small-0.43:normalized")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--trajectories", type=int, default=32)
    parser.add_argument("--data", type=int, default=1000, metavar="N", help="pictures that :data trains on")
    parser.add_argument("--pictures", type=int, default=1002, help="that are judged")
    parser.add_argument("--only", nargs="*", default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work: Path = options.work

    stated = judged.scenes(options.pictures)
    results = work / "distilled.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for row in options.only:
        name, features, *data = row.split(":")
        budget = Budget(steps=options.steps, batch=options.batch, rate=options.rate, features=features)
        source = {"data": options.data} if data else {"trajectories": options.trajectories}
        how = {"budget": dataclasses.asdict(budget), **source}
        same = {"plan": name, "pictures": len(stated), **how}
        # Older rows do not say their trajectories.
        done = next(
            (
                line
                for line in known
                if same.items() <= {**how, **line}.items() and ("data" in line) == bool(data)
            ),
            None,
        )
        if done is not None:
            show(done)
            continue
        program = read_program(trimtab.load(work / "whole.bundle").bundle)
        plan = load_plan(work / f"{name}.json")
        teacher, label = program.segments["denoiser"].model, "-".join((name, features, *data))
        batches = drawn(work, options.data, teacher) if data else walked(work, options.trajectories, teacher)
        start = time.process_time()
        student = distill(
            teacher,
            plan,
            batches,
            budget,
            checkpoint=work / f"{label}.checkpoint",
        )
        seconds = time.process_time() - start
        folder = work / label
        plan.save(folder / "removal.json")
        save_weights(folder, student.weights, student.teacher)
        program = remove_layers(program, plan)
        put_back(program.segments["denoiser"].model, folder)
        with draft(program, work / f"draft-{label}", threads=1) as pipeline:
            score = judged.score(judged.draw(pipeline, stated), stated)
        line = {"plan": name, "reached": plan.reached, "features": features, "cpu_seconds": round(seconds)}
        line |= {"steps": student.steps, "losses": student.losses, **score, **how}
        with results.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        show(line)


def walked(work: Path, trajectories: int, teacher: ir.Model) -> Batches:
    """The teacher's own trajectories, with captions of the sample's grammar."""
    captions = judged.captions()
    with trimtab.load(work / "whole.bundle", threads=1) as pipeline:
        requests = own_requests(pipeline, trajectories, prompts=captions, guidance=judged.GUIDANCE)
        return Trajectories(teacher, record(pipeline, requests))


def drawn(work: Path, number: int, teacher: ir.Model) -> Batches:
    """Scenes of the sample, drawn, with their captions."""
    folder = judged.draw_scenes(work / f"pictures-{number}", number)
    with trimtab.load(work / "whole.bundle", threads=1) as pipeline:
        noising = noising_of(Source(judged.MODEL).load("scheduler"))
        return Pictures(pipeline, teacher, noising, captioned(folder))


def show(line: dict[str, Any]) -> None:
    """A row as it is kept."""
    kind = line["features"] + (":data" if "data" in line else "")
    print(
        f"{line['plan']:<20}{kind:<17}{line['steps']:>6} steps {line['cpu_seconds']:>6.0f} s CPU "
        f"{100 * line['overall']:>6.1f} ± {100 * line['error']:.1f} %",
        flush=True,
    )


if __name__ == "__main__":
    main()
