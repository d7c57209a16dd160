"""Claim: what a plan says of memory is what is measured: an engine's activations within 25%, a CPU run within 15%.

    python benchmarks/plan.py BUNDLE... [--target rtx-4090] [--precision fp16] [--cache DIR]
                              [--size WxH] [--skip-engines] [--skip-cpu] [--json]

Engines are built by TensorRT for RTX (no GPU is needed), strongly typed, at the native size or `--size`, and report
the memory that they ask for beside their weights. The CPU run is one process of its own: it loads the bundle, draws
with the first schedule's first two steps, and its resident memory at the most is read from /proc. BUNDLE is compiled
for `cpu`; benchmarks/models.py writes Stable Diffusion 1.5 at its size, whose engine takes 11 GB of memory to build.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from trimtab.bundle import Bundle, open_bundle
from trimtab.passes.precision import convert
from trimtab.program import Program
from trimtab.recipe import parse_size
from trimtab.storage import read_program
from trimtab.targets.bindings import segment_shapes
from trimtab.targets.cache import EngineCache
from trimtab.targets.device import find_device
from trimtab.targets.engines import build_options, builder_for, specialized
from trimtab.targets.estimate import plan

ENGINE_GOAL, CPU_GOAL = 0.25, 0.15

_RUN = """
import sys
from trimtab.runtime.bench import peak_bytes
from trimtab.runtime.load import load
with load(sys.argv[1], target="cpu") as pipe:
    task = pipe.bundle.contents.tasks[pipe.tasks[0]]
    kinds = {spec.source.get("kind") for spec in task.inputs}
    what = {"label": 0} if "label" in kinds else {"prompt": "a red circle"} if pipe.bundle.contents.tokenizers else {}
    request, plan, _ = pipe.prepare(seed=0, **what)
    plan.begin(request)
    for step in plan.steps[:2]:
        step.run(request)
    plan.epilogue.run(None)
print(peak_bytes())
"""


def cpu_peak(bundle: Path) -> int:
    """Bytes that a process holds at the most while it draws."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(bundle)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1])


def engines(
    bundle: Bundle, program: Program, target: str, precision: str, size: tuple[int, int], cache: Path
) -> list[dict[str, Any]]:
    """Predicted and reported activations of every segment that a picture calls."""
    device = find_device(target)
    builder = builder_for(device)
    store = EngineCache(cache)
    shapes = segment_shapes(bundle.contents, size)
    made = []
    for segment in plan(program, bundle.contents, device, precision=precision, size=size).segments:
        graph = convert(program.segments[segment.name].model, precision, {}).model
        fixed = specialized(graph, shapes[segment.name][0])
        options = build_options(device, shapes[segment.name][0], precision)
        with store.get_or_build(fixed, device, options, builder) as entry:
            info = dataclasses.asdict(entry.info)
        made.append(
            {
                "what": f"{segment.name}, {target}, {precision}",
                "predicted": segment.activation_bytes,
                "measured": info["activation_bytes"],
                "goal": ENGINE_GOAL,
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--target", default="rtx-4090")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/trimtab"))
    parser.add_argument(
        "--size", type=parse_size, metavar="WxH", help="of the engines; default: the native one"
    )
    parser.add_argument("--skip-engines", action="store_true")
    parser.add_argument("--skip-cpu", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for path in arguments.bundles:
        bundle = open_bundle(path)
        program = read_program(bundle)
        found = []
        if not arguments.skip_cpu:
            whole = plan(program, bundle.contents, find_device("cpu"), precision="fp32")
            measured = cpu_peak(path)
            found.append(
                {
                    "what": "a run on the CPU",
                    "predicted": whole.peak_bytes,
                    "measured": measured,
                    "goal": CPU_GOAL,
                }
            )
        if not arguments.skip_engines:
            size = arguments.size or bundle.contents.size
            found += engines(bundle, program, arguments.target, arguments.precision, size, arguments.cache)
        for row in found:
            ratio = row["predicted"] / row["measured"] if row["measured"] else None
            rows.append({"bundle": path.name} | row | {"ratio": ratio})
            if not arguments.json and ratio is not None:
                verdict = "within" if abs(ratio - 1) <= row["goal"] else "BEYOND"
                print(
                    f"{path.name:24} {row['what']:36} predicted {row['predicted'] / 1e6:9.2f} MB, measured "
                    f"{row['measured'] / 1e6:9.2f} MB: {ratio:.3f} ({verdict} {row['goal']:.0%})",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps({"rows": rows, "command": " ".join(["python", *sys.argv])}))


if __name__ == "__main__":
    main()
