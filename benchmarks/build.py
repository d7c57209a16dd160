"""Claim: a U-Net of Stable Diffusion 1.5's size becomes a TensorRT-RTX engine without a GPU, and then is found again.

    python benchmarks/build.py [--precision fp16|fp32] [--bundle BUNDLE] [--target rtx-4090] [--json]

Prints what the build took, the most memory that the building process held, the engine's bytes against the weights'
(goal: at most 1.05 times), and what the same call takes when the cache has the engine (goal: under 2 s): the graph is
lowered, every byte of it hashed, the engine found and every byte of that hashed too. Each call is a fresh process.

Without a bundle, one is compiled from random weights. For FP16 every tensor is declared to stay below 1: what is
claimed is time and bytes, and not a picture. Takes 12 GB of disk, given back at the end, and 11 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import models

BYTES_GOAL = 1.05
FOUND_GOAL_S = 2.0
FOUND_ROUNDS = 3


def prepare(bundle: Path, precision: str, folder: Path) -> dict[str, Any]:
    """Writes the denoiser's graph with fixed sizes and in a precision, as a bundle holds it."""
    import onnx_ir as ir

    from trimtab.bundle import open_bundle
    from trimtab.passes.precision import convert
    from trimtab.targets.bindings import segment_shapes
    from trimtab.targets.engines import specialized
    from trimtab.weights import WeightStore, parameter_count, weight_bytes

    opened = open_bundle(bundle)
    contents = opened.contents
    (name,) = (name for name in contents.segments if name.startswith("denoiser"))
    shapes = segment_shapes(contents, contents.size)[name][0]
    model = ir.load(bundle / contents.segments[name].graph)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    result = convert(model, precision, {value.name or "": 1.0 for value in values})
    model = specialized(result.model, shapes)
    folder.mkdir()
    WeightStore(folder).keep("graph", model)
    ir.save(model, folder / "graph.onnx")
    return {
        "shapes": shapes,
        "parameters": parameter_count(model),
        "weight_bytes": weight_bytes(model),
        "kept_in_fp32": len(result.refused),
    }


def get(folder: Path, cache: Path, target: str, precision: str, shapes: Any) -> dict[str, Any]:
    """The engine of that graph, from the cache or built."""
    import onnx_ir as ir

    from trimtab.targets.cache import EngineCache
    from trimtab.targets.device import find_device
    from trimtab.targets.engines import build_options, builder_for

    device = find_device(target)
    builder = builder_for(device)
    builder.version  # imports TensorRT  # noqa: B018
    start = time.perf_counter()
    model = ir.load(folder / "graph.onnx")
    loaded = time.perf_counter()
    processor = time.process_time()
    options = build_options(device, {k: tuple(v) for k, v in shapes.items()}, precision)
    with EngineCache(cache).get_or_build(model, device, options, builder) as entry:
        return {
            "source": entry.source,
            "load_seconds": loaded - start,
            "seconds": time.perf_counter() - loaded,
            "cpu_seconds": time.process_time() - processor,
            "bytes": entry.info.bytes,
            "build_seconds": entry.info.seconds,
            "build_peak_bytes": entry.info.peak_bytes,
            "activation_bytes": entry.info.activation_bytes,
            "version": entry.info.backend_version,
        }


def measure(bundle: Path | None, precision: str, target: str, part: str, scratch: Path) -> dict[str, Any]:
    """Runs every part in a process of its own."""
    if bundle is None:
        bundle = scratch / "bundle"
        models.make(scratch / "pipeline", part)
        command = [sys.executable, "-m", "trimtab", "compile", str(scratch / "pipeline"), "-o", str(bundle)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    graph = _child("prepare", bundle, precision, scratch / "graph")
    wanted = (scratch / "graph", scratch / "cache", target, precision, json.dumps(graph["shapes"]))
    built = _child("get", *wanted)
    found = [_child("get", *wanted) for _ in range(FOUND_ROUNDS)]
    assert [built["source"], *(each["source"] for each in found)] == ["built"] + ["local"] * FOUND_ROUNDS
    return {
        "target": target,
        "precision": precision,
        "graph": graph,
        "built": built,
        "found": found,
        "bytes_ratio": built["bytes"] / graph["weight_bytes"],
        "found_seconds": statistics.median(each["seconds"] for each in found),
        "found_cpu_seconds": statistics.median(each["cpu_seconds"] for each in found),
        "goals": {"bytes_ratio": BYTES_GOAL, "found_seconds": FOUND_GOAL_S},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "command": " ".join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("tensorrt-rtx", "onnx-ir")},
    }


def _child(*arguments: object) -> Any:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def _show(result: dict[str, Any]) -> None:
    built, found, graph = result["built"], result["found"], result["graph"]
    print(f"{graph['parameters']:,} parameters, {result['precision']}, for {result['target']}")
    print(f"build             {built['build_seconds']:8.1f} s    (the whole call {built['seconds']:.1f} s)")
    print(f"its peak memory   {built['build_peak_bytes'] / 1e6:8.0f} MB")
    print(f"engine / weights  {result['bytes_ratio']:8.4f}      (goal: {BYTES_GOAL})")
    print(f"activations       {(built['activation_bytes'] or 0) / 1e6:8.0f} MB")
    times = f"{min(f['seconds'] for f in found):.2f} .. {max(f['seconds'] for f in found):.2f}"
    print(f"found in cache    {result['found_seconds']:8.2f} s    [{times}] (goal: {FOUND_GOAL_S:g} s)")
    print(f"  processor time  {result['found_cpu_seconds']:8.2f} s    on {result['cores']} cores")
    print(f"load average      {result['load_average']:8.1f}")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        what, *rest = sys.argv[2:]
        if what == "prepare":
            print(json.dumps(prepare(Path(rest[0]), rest[1], Path(rest[2]))))
        else:
            print(json.dumps(get(Path(rest[0]), Path(rest[1]), rest[2], rest[3], json.loads(rest[4]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--target", default="rtx-4090", metavar="NAME", help="a device of TensorRT for RTX")
    parser.add_argument("--bundle", type=Path, help="whose denoiser; else one is compiled")
    parser.add_argument(
        "--part", choices=("unet", "none"), default="unet", help="none: a tiny one, as a check"
    )
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        result = measure(
            arguments.bundle, arguments.precision, arguments.target, arguments.part, Path(folder)
        )
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(result)


if __name__ == "__main__":
    main()
