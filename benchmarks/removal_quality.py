"""Claim: layers chosen by output loss cost less quality than those chosen by hand, by magnitude or by chance.

    python benchmarks/removal_quality.py --work FOLDER [--pictures 1002] [--steps 20]

Draws judged pictures with the shipped U-Net whole and after each removal, without any training, and prints the
share of stated attributes that the judge finds, with standard errors over pictures. A row is kept in
FOLDER/quality.jsonl as soon as it is measured, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import judged

import trimtab
from trimtab.calibration.choice import Wish
from trimtab.calibration.draft import draft
from trimtab.calibration.measures import parameters
from trimtab.calibration.planning import Calibration, chosen, plan_of, score_layers
from trimtab.passes.removal import remove_layers
from trimtab.storage import read_program

ROWS = (
    ("output-loss", 0.5),
    ("magnitude", 0.5),
    ("random", 0.5),
    ("bk-sdm-small", 0.43),
    ("output-loss", 0.3),
    ("magnitude", 0.3),
    ("random", 0.3),
    ("bk-sdm-base", 0.33),
)
"""The handcrafted choices have shares of their own: the nearest ones."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=1002)
    parser.add_argument("--rival-pictures", type=int, default=402, help="of each rival: they are far off")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    results = work / "quality.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    bundle = work / "whole.bundle"
    if not bundle.exists():
        trimtab.compile(judged.MODEL, bundle, steps=(options.steps,))
    stated = judged.scenes(options.pictures)

    def measure(name: str, share: float, **more: object) -> None:
        program = read_program(trimtab.load(bundle).bundle)
        plan = more.pop("plan", None)
        if plan is not None:
            program = remove_layers(program, plan)
            more |= {"reached": plan.reached, "predicted": plan.predicted_loss, "joint": plan.joint_loss}
        part = stated if name in ("whole", "output-loss") else stated[: options.rival_pictures]
        start = time.process_time()
        with draft(program, work / f"draft-{name}-{share}", threads=1) as pipeline:
            pictures = judged.draw(pipeline, part)
        row = {"method": name, "share": share, **more, **judged.score(pictures, part)}
        row["cpu_seconds"] = round(time.process_time() - start)
        known.append(row)
        with results.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    done = {(row["method"], row["share"]) for row in known}
    if ("whole", 0.0) not in done:
        measure("whole", 0.0)
    calibration = Calibration(samples=options.samples, log=work / "losses.jsonl")
    graph, scores = score_layers(read_program(trimtab.load(bundle).bundle), calibration, work / "draft")
    candidates, losses = graph.candidates, {name: scores.mean(name) for name in graph.candidates}
    for method, share in ROWS:
        wish = Wish(share)
        removed = chosen(candidates, wish, method, losses, 0)
        plan = plan_of(graph, scores, removed, method, wish, parameters(candidates), calibration)
        plan.save(work / f"{method}-{share}.json")
        if (method, share) not in done:
            measure(method, share, plan=plan)

    whole = next(row for row in known if row["method"] == "whole")["overall"]
    print(
        f"{'method':<16}{'removed':>9}{'attributes, %':>18}{'decline, %':>12}{'count, %':>16}{'joint loss':>12}"
    )
    for row in known:
        score = f"{100 * row['overall']:.1f} ± {100 * row['error']:.1f}"
        count = f"{100 * row['count']:.1f} ± {100 * row['count_error']:.1f}"
        print(
            f"{row['method']:<16}{row.get('reached', 0.0):>9.1%}{score:>18}"
            f"{100 * (1 - row['overall'] / whole):>12.1f}{count:>16}{row.get('joint', 0.0):>12.2e}"
        )


if __name__ == "__main__":
    main()
