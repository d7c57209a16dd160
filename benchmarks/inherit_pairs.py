"""Claim: schedules of inheritance that a search found are not below uniform ones at equal speed, picture by picture.

    python benchmarks/inherit_pairs.py ROWS.jsonl [--bundle PLAIN] [--pictures 1500] [--json]

ROWS is what `inherit_quality.py --log` wrote: of it, every schedule that a search took in the place of the uniform
one. Both draw the same pictures, other ones than the rows were scored on: the same captions from the same noise. What
is told is the difference of the share of stated attributes that the sample's judge finds, and its standard error over
pictures: what is hard in a picture is so for both, so it is smaller than that of either share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import judged
import numpy as np
from inherit_quality import SCHEDULE, one_schedule

import trimtab
from trimtab.calibration.draft import draft
from trimtab.passes.inherit import inherit
from trimtab.passes.inherit_plan import FULL, InheritPlan
from trimtab.passes.partition import partition


def found(plain: Path, plan: InheritPlan, folder: Path, stated: list[Any]) -> np.ndarray:
    """`judged.counts` under a plan."""
    with draft(partition(inherit(one_schedule(plain), plan)), folder) as pipe:
        return judged.counts(judged.answers(judged.draw(pipe, stated), stated))


def pair(row: dict[str, Any], plain: Path, scratch: Path, stated: list[Any]) -> dict[str, Any]:
    """A searched schedule and the uniform one of its speed."""
    skip, _, every = row["name"].partition(", searched as ")
    choices = tuple(FULL if letter == "F" else skip for letter in row["pattern"])
    plans = {
        "uniform": InheritPlan((skip,), int(every)),
        "searched": InheritPlan((skip,), choices={SCHEDULE: choices}),
    }
    counts = {
        name: found(plain, plan, scratch / f"{row['name']}-{name}", stated) for name, plan in plans.items()
    }
    difference, error = judged.ahead(counts["uniform"], counts["searched"])
    shares = {name: count[:, 0].sum() / count[:, 1].sum() for name, count in counts.items()}
    return {"name": row["name"], "speed": row["speed"], **shares, "difference": difference, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--bundle", type=Path, help="the sample's plain bundle (default: it is compiled)")
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    stated = judged.scenes(options.pictures + 300)[300:]  # the first are those of the rows
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        plain = options.bundle or scratch / "plain.bundle"
        if options.bundle is None:
            trimtab.compile(judged.MODEL, plain)
        for row in rows:
            if row.get("kind") == "searched":
                pairs.append(pair(row, plain, scratch, stated))
                if not options.json:
                    each = pairs[-1]
                    print(
                        f"{each['name']:28}{each['speed']:6.2f}  uniform {each['uniform']:.2%}  "
                        f"searched {each['searched']:.2%}  ahead by {each['difference']:+.2%} ± {each['error']:.2%}",
                        flush=True,
                    )
    if options.json:
        print(json.dumps({"pictures": options.pictures, "pairs": pairs}))


if __name__ == "__main__":
    main()
