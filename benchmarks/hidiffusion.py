"""HiDiffusion: time by size against the plain model, and how many objects are drawn against how many were asked for.

    python benchmarks/hidiffusion.py                      # both
    python benchmarks/hidiffusion.py --part time --threads 1
    python benchmarks/hidiffusion.py --part objects --pictures 500

Time: a U-Net of Stable Diffusion 1.5's shape, narrow enough for four times the trained side to fit into the memory
of a small machine (attention keeps its scores on the CPU), weights random. The steps of every phase are measured in
turn with those of the plain bundle, and weighted as 20 steps have them. Without guidance: one row.

Objects: the sample U-Net, which was trained at 64x64, draws one object at 128x128. What is drawn is counted as
connected areas that differ from the background: duplicated objects are what HiDiffusion is to prevent.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
from scipy import ndimage

import trimtab

SAMPLE = Path(__file__).parents[1] / "samples" / "01_shapes"
STEPS = 20
CHANGE = 0.25
"""A pixel belongs to an object if a channel differs by more than this from the background, on a scale of 0 to 1."""
LEAST_AREA = 64
"""Pixels of the smallest object that counts; a small one of the sample's world has some 150 at 64x64."""


def loop_seconds(pipe: Any, size: tuple[int, int], rounds: int) -> float:
    """Processor seconds of the loop: of each kind of step, by what its calls read, the least of some rounds."""
    request, plan, settings = pipe.prepare("a", seed=0, size=size, schedule=STEPS, guidance=1.0)
    plan.begin(request)
    schedule = pipe.bundle.contents.tasks[pipe.tasks[0]].schedules[settings["schedule"]]
    first: dict[tuple[Any, ...], int] = {}
    counts: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for index, step in enumerate(schedule.steps):
        kind = tuple(
            (c.segment, tuple(sorted(t for t in c.inputs.values() if "[" not in t))) for c in step.calls
        )
        first.setdefault(kind, index)
        counts[kind] += 1
    total = 0.0
    for kind, index in first.items():
        step = plan.steps[index]
        taken = []
        for _ in range(rounds + 1):
            step.begin(request)
            start = time.process_time()
            for call in step.calls:
                call.run()
            taken.append(time.process_time() - start)
        total += counts[kind] * min(taken[1:])
    return total


def measure_time(threads: int, rounds: int, sizes: Sequence[int]) -> None:
    """Prints the time of 20 steps by size."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models.make(folder / "model", "narrow")
        for name in ("plain", "hidiffusion"):
            trimtab.compile(folder / "model", folder / name, steps=(STEPS,), hidiffusion=name != "plain")
        print(
            f"{'size':>10} {'plain, s':>10} {'rewritten, s':>13} {'ratio':>7}   of {STEPS} steps, processor time"
        )
        for size in sizes:
            found = []
            for name in ("plain", "hidiffusion"):
                with trimtab.load(folder / name, threads=threads) as pipe:
                    found.append(loop_seconds(pipe, (size, size), rounds))
            plain, ours = found
            print(f"{size:>6} px {plain:>11.2f} {ours:>13.2f} {ours / plain:>7.3f}", flush=True)


def count_objects(picture: np.ndarray) -> int:
    """Connected areas of a picture (height, width, 3) in 0..1 that differ from its background."""
    background = np.median(picture.reshape(-1, 3), axis=0)
    labels, number = ndimage.label(np.abs(picture - background).max(axis=2) > CHANGE)
    areas = ndimage.sum_labels(np.ones_like(labels), labels, range(1, number + 1))
    return int((np.asarray(areas) >= LEAST_AREA).sum())


def measure_objects(pictures: int, threads: int, sheet: Path | None) -> None:
    """Prints how many objects are drawn where one was asked for."""
    sys.path.insert(0, str(SAMPLE))
    from shapes import sample_scenes

    captions = [scene.caption for scene in sample_scenes(9700, pictures, 1)]
    rows = []
    print(f"{'':<14} {'pictures':>9} {'objects':>16} {'exactly one':>16}   one asked for, at 128x128")
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("plain", "hidiffusion"):
            bundle = Path(scratch) / name
            trimtab.compile(
                SAMPLE / "models" / "shapes-sd", bundle, steps=(STEPS,), hidiffusion=name != "plain"
            )
            counts: list[int] = []
            with trimtab.load(bundle, threads=threads) as pipe:
                for start in range(0, pictures, 20):
                    made = pipe(
                        captions[start : start + 20], seed=start, size=(128, 128), guidance=5.0
                    ).pixels
                    counts += [count_objects(picture) for picture in made]
                    if start == 0:
                        rows.append(np.concatenate(list(made[:8]), axis=1))
            one = [count == 1 for count in counts]
            print(f"{name:<14} {pictures:>9} {shown(counts):>16} {shown(one, 100):>16}", flush=True)
    if sheet is not None:
        from PIL import Image

        Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(sheet, optimize=True)


def shown(values: Sequence[float], scale: float = 1.0) -> str:
    """A mean with its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{scale * statistics.mean(values):.2f} +- {scale * error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("time", "objects", "both"), default="both")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument(
        "--sheet", type=Path, help="write the first pictures, plain above rewritten, to this PNG"
    )
    options = parser.parse_args()
    if options.part != "objects":
        measure_time(options.threads, options.rounds, options.sizes)
    if options.part != "time":
        measure_objects(options.pictures, options.threads, options.sheet)


if __name__ == "__main__":
    main()
