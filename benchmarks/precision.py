"""FP16 against FP32 of a bundle: the picture, time, memory and bytes, and how far maxima differ between pictures.

    python benchmarks/precision.py BUNDLE [--pictures 8]

The last column of ranges is what `trimtab.passes.precision.MARGIN` has to cover: the maximum of a tensor over all
pictures, against its maximum in the one that a compilation measures on schedules of 20 steps.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from trimtab.bundle import open_bundle
from trimtab.calibration.draft import draft
from trimtab.calibration.ranges import measure_ranges
from trimtab.calibration.trajectories import own_requests
from trimtab.runtime.bench import bench
from trimtab.storage import read_program
from trimtab.targets.precision import in_precision


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        compare(arguments.bundle, arguments.pictures, Path(scratch))


def compare(bundle: Path, pictures: int, scratch: Path) -> None:
    program = read_program(open_bundle(bundle))
    with draft(program, scratch / "fp32") as pipeline:
        requests = own_requests(pipeline, pictures)
        whole = [pipeline(**request).pixels for request in requests]
    measured = [measure_ranges(program, scratch / "measured", requests=[request]) for request in requests]
    print(f"{'segment':16} {'tensors':>8} {'largest':>9}  maximum of all pictures / of the first")
    for segment, first in measured[0].segments.items():
        names = [name for name, value in first.items() if 0 < value < 1e30]
        table = np.array([[each.segments[segment][name] for name in names] for each in measured])
        ratios = table.max(axis=0) / table[0]
        large = ratios[table[0] >= 0.1 * table[0].max()]
        print(
            f"{segment:16} {len(names):8} {table.max():9.4g}  median {np.median(ratios):.2f}, 99% "
            f"{np.quantile(ratios, 0.99):.2f}, worst {ratios.max():.2f}; of the largest tensors {large.max():.2f}"
        )
    with draft(in_precision(program, "fp16", measured[0].segments), scratch / "fp16") as pipeline:
        half = [pipeline(**request).pixels for request in requests]
    differences = 255 * np.abs(np.array(whole) - np.array(half))
    print(f"FP16 - FP32, in 1/255: mean {differences.mean():.3f}, worst {differences.max():.3f}")
    result = bench([scratch / "fp16", scratch / "fp32"])
    for each in result["bundles"]:
        weights = sum(p.stat().st_size for p in (Path(each["bundle"]) / "graphs").glob("*.weights"))
        print(
            f"{Path(each['bundle']).name}: step {each['step_ms']:.1f} ms, peak {each['peak_bytes'] / 1e6:.0f} MB, "
            f"weights {weights / 1e6:.1f} MB"
        )
    print(f"step, FP16 / FP32: {result['step_ratio']:.2f}")


if __name__ == "__main__":
    main()
