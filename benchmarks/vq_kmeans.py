"""Claim: k-means of all of DiT-XL/2 takes two cores at most 10 minutes and 6 GB, and errs as little as faiss's own.

    python benchmarks/vq_kmeans.py GRAPH [--store FOLDER] [--compare 6] [--threads 2]

GRAPH is the denoiser of a compiled bundle. All weights that `--vq 2` packs are packed, in a process of its own whose
memory is read from /proc; a FOLDER then serves `trimtab compile --vq-codebooks`. Some of the same weights are then
clustered by `faiss.Kmeans` too, with as many iterations (100), each over all sub-vectors, from as many codewords; the
errors of both are before the codewords are rounded to FP16. Random weights, where the model has such, are the hardest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx_ir as ir

from trimtab.calibration.codebook_plan import Settings, choose, plan
from trimtab.calibration.kmeans import ITERATIONS, cluster, make_codebooks
from trimtab.passes import vq_op
from trimtab.passes.codebooks import FORMATS
from trimtab.passes.vq import Site, sites
from trimtab.runtime.bench import peak_bytes

MINUTES_GOAL, BYTES_GOAL = 10, 6e9
SETTINGS = Settings(2)


def whole(graph: Path, store: Path, threads: int) -> dict[str, Any]:
    """Packs everything."""
    model = ir.load(graph)
    start, processor = time.perf_counter(), time.process_time()
    books = make_codebooks({"denoiser": model}, SETTINGS, store, threads=threads)
    seconds = time.perf_counter() - start
    return {
        "weights": len(books.layers),
        "elements": sum(layer.codes.shape[0] * layer.columns for layer in books.layers.values()),
        "seconds": seconds,
        "cpu_seconds": time.process_time() - processor,
        # With pages of the mapped graph, which are the system's to take back at any time: no less than is needed.
        "peak_bytes": peak_bytes(),
    }


def compare(site: Site, codewords: int, threads: int) -> dict[str, Any]:
    """The mean squared error and the time of one weight, ours and faiss's, on the same threads."""
    length = FORMATS[SETTINGS.bits].length
    vectors = np.ascontiguousarray(vq_op.cut(site.rows(), length).reshape(-1, length), np.float32)
    faiss.omp_set_num_threads(threads)
    start = time.perf_counter()
    ours = cluster(vectors, codewords)
    middle = time.perf_counter()
    rival = faiss.Kmeans(
        length, codewords, niter=sum(ITERATIONS), seed=1, max_points_per_centroid=len(vectors)
    )
    rival.train(vectors)
    end = time.perf_counter()
    return {
        "name": site.name,
        "vectors": len(vectors),
        "ours": _error(vectors, ours),
        "faiss": _error(vectors, rival.centroids),
        "ours_seconds": middle - start,
        "faiss_seconds": end - middle,
    }


def _error(vectors: np.ndarray, codebook: np.ndarray) -> float:
    return float(faiss.knn(vectors, codebook, 1)[0].mean(dtype=np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("graph", type=Path)
    parser.add_argument("--store", type=Path, help="keeps the codebooks; must be new")
    parser.add_argument(
        "--compare", type=int, default=6, metavar="N", help="weights, of different shapes first"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(whole(options.graph, options.store, options.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder) / "store"
        command = [sys.executable, __file__, str(options.graph), "--store", str(store), "--child"]
        done = subprocess.run(
            [*command, "--threads", str(options.threads)], check=True, stdout=subprocess.PIPE
        )
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{result['weights']} weights, {result['elements']:,} elements, to {SETTINGS.bits} bits")
    print(
        f"time         {result['seconds'] / 60:8.2f} min (goal: {MINUTES_GOAL}), "
        f"{result['cpu_seconds'] / 60:.2f} of processor time"
    )
    print(f"peak memory  {result['peak_bytes'] / 1e9:8.2f} GB (goal: {BYTES_GOAL / 1e9:g})")
    print(f"load average {os.getloadavg()[0]:8.1f}")
    found = {site.name: site for site in sites(ir.load(options.graph))}
    groups = plan(found, choose(found, SETTINGS), SETTINGS)
    own = {group.names[0]: group.codewords for group in groups if len(group.names) == 1}
    shapes: dict[tuple[int, ...], Site] = {}
    for name in own:
        shapes.setdefault(found[name].shape, found[name])
    print(f"\n{'weight':<52}{'sub-vectors':>12}{'MSE / faiss':>13}{'time / faiss':>14}")
    ratios = []
    for site in list(shapes.values())[: options.compare]:
        row = compare(site, own[site.name], options.threads)
        ratios.append(row["ours"] / row["faiss"])
        print(
            f"{row['name']:<52}{row['vectors']:>12,}{ratios[-1]:>13.5f}"
            f"{row['ours_seconds'] / row['faiss_seconds']:>14.3f}",
            flush=True,
        )
    print(f"{'geometric mean':<64}{math.exp(np.mean(np.log(ratios))):>13.5f}")


if __name__ == "__main__":
    main()
