"""Claim: convolutions with experts by time step bring a pruned U-Net's quality nearer to the whole one's, at its speed.

    python benchmarks/experts.py --plan PLAN [--experts 0 4] [--steps 600] [--work FOLDER] [--json]

The sample's U-Net (samples/01_shapes) with the plan's layers removed, distilled with as many optimizer steps, on the
same trajectories of the teacher (with --data N on the same N drawn scenes and their captions), once plain (0) and once
with K experts in K ranges of time steps for every convolution of its blocks. Then 1002 pictures each: the share of
stated attributes that the judge finds, with its standard error over pictures, and how far it is ahead of the first
row's, picture by picture. The bundles then draw the same pictures in turns, on one thread: processor time, and its
ratio to the first's. A student that lies in FOLDER already is not trained again. K may be K/N for N ranges.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import judged
import torch

import trimtab
from trimtab.distillation import distill
from trimtab.passes.experts import Experts
from trimtab.passes.removal import load_plan

ROUNDS = 7


def row(kind: str, options: argparse.Namespace, stated: Any) -> dict[str, Any]:
    """One student: trained, compiled and judged."""
    count, _, ranges = kind.partition("/")
    experts = Experts(int(count), int(ranges or count)) if count != "0" else None
    source = f"{options.data}-pictures" if options.data else f"{options.trajectories}-trajectories"
    label = f"{options.plan.stem}-{source}-{options.steps}-steps-{kind.replace('/', 'of')}-experts"
    folder = options.work / label
    bundle = folder.with_name(folder.name + ".bundle")
    trained: dict[str, Any] = {}
    if not folder.exists():
        start = time.process_time()
        trained = distill(
            judged.MODEL,
            options.plan,
            folder,
            trajectories=options.trajectories,
            prompts=tuple(judged.captions()),
            guidance=judged.GUIDANCE,
            data=judged.draw_scenes(options.work / "pictures", options.data) if options.data else None,
            experts=experts,
            budget={"steps": options.steps, "rate": options.rate, "features": options.features},
        )
        trained = {"losses": trained["losses"], "cpu_seconds": round(time.process_time() - start)}
    if not bundle.exists():
        trimtab.compile(judged.MODEL, bundle, removal_plan=str(folder))
    with trimtab.load(bundle, threads=1) as pipeline:
        found = judged.answers(judged.draw(pipeline, stated), stated)
        segments = [s for s in pipeline.bundle.contents.segments.values() if s.name.startswith("denoiser")]
    files = sum(file.stat().st_size for file in (bundle / "graphs").glob("denoiser*.weights"))
    kernels = {"segments": len(segments), "weight_bytes": files}
    score = judged.summary(found) | {"counts": judged.counts(found)}
    return {"experts": kind, **score, **kernels, **trained, "bundle": str(bundle)}


def timed(rows: list[dict[str, Any]]) -> None:
    """Adds processor seconds of drawing a picture, the bundles in turns, and their ratio to the first one's."""
    pipelines = [trimtab.load(row["bundle"], threads=1) for row in rows]
    taken: list[list[float]] = [[] for _ in rows]
    for number in range(ROUNDS + 1):
        for pipeline, seconds in zip(pipelines, taken, strict=True):
            start = time.process_time()
            pipeline("a red circle", seed=number, guidance=judged.GUIDANCE)
            seconds.append(time.process_time() - start)
    for row, pipeline, seconds in zip(rows, pipelines, taken, strict=True):
        pipeline.close()
        row["draw_seconds"] = statistics.median(seconds[1:])  # the first one warms up
        row["ratio"] = row["draw_seconds"] / rows[0]["draw_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, required=True, help="a removal plan for the sample's U-Net")
    parser.add_argument("--experts", nargs="*", default=("0", "4"), metavar="K[/N]")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--features", default="plain")
    parser.add_argument("--trajectories", type=int, default=96)
    parser.add_argument("--data", type=int, metavar="N", help="drawn scenes to train on in their place")
    parser.add_argument("--pictures", type=int, default=1002)
    parser.add_argument("--work", type=Path, help="where students and bundles are kept")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or Path(folder)
        stated = judged.scenes(options.pictures)
        rows = [row(kind, options, stated) for kind in options.experts]
        first, *_ = counts = [entry.pop("counts") for entry in rows]
        for entry, own in zip(rows, counts, strict=True):
            entry["ahead"], entry["ahead_error"] = judged.ahead(first, own)
        timed(rows)
    plan = load_plan(options.plan)
    if options.json:
        print(json.dumps({"removed": plan.reached, "steps": options.steps, "rows": rows}))
        return
    print(f"{plan.reached:.1%} removed by {plan.method}, {options.steps} steps, {options.features} features")
    heads = f"{'attributes':>16}{'ahead of first':>18}{'segments':>11}{'weights':>12}{'a picture':>12}{'ratio':>8}"
    print(f"{'experts':<10}{heads}")
    for entry in rows:
        score = f"{100 * entry['overall']:.1f} ± {100 * entry['error']:.1f} %"
        gain = f"{100 * entry['ahead']:+.2f} ± {100 * entry['ahead_error']:.2f} %"
        size, seconds = f"{entry['weight_bytes'] / 1e6:.1f} MB", f"{entry['draw_seconds']:.3f} s"
        print(
            f"{entry['experts']:<10}{score:>16}{gain:>18}{entry['segments']:>11}{size:>12}{seconds:>12}{entry['ratio']:>8.3f}"
        )


if __name__ == "__main__":
    main()
