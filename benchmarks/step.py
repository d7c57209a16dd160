"""Claim: a step of Stable Diffusion 1.5 on the CPU takes less time than in torch: at most 0.95 times.

    python benchmarks/step.py [--rounds N] [--threads N] [--json] [--scratch FOLDER]

One step is the U-Net (859,520,964 parameters, random weights, fp32) on two guidance rows of 4x64x64 latents
with 77 tokens, the guidance and DDIM's update. trimtab compiles it as any pipeline, with a tiny text encoder
and VAE around it, and its runtime runs it; torch runs it eagerly as diffusers' pipeline does. Each has a
process of its own, so that memory is its own, and all cores (or N threads); they take turns step by step, so
that a machine that changes its speed changes it for both. Processor time is printed too: on a machine that
does other work it says more than the clock, with one thread each (with more, waiting threads spin). What they
compute is compared. Takes 7 GB of disk and 12 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import models

from trimtab.runtime.bench import peak_bytes

GOAL = 0.95
SCHEDULE = 20
GUIDANCE = 7.5


def ours(connection: Connection, bundle: str, shared: str, threads: int) -> None:
    """Steps of trimtab's runtime; writes what the first one was given and gave for the other to compare."""
    import numpy as np

    from trimtab.program import STATE
    from trimtab.runtime.load import load

    with load(bundle, threads=threads) as pipe:
        request, plan, _ = pipe.prepare("a red circle", seed=0, guidance=GUIDANCE)
        plan.begin(request)
        call = plan.steps[0].calls[0]
        given = {
            "sample": plan.buffers[STATE][0].copy(),
            "hidden": call.inputs["encoder_hidden_states"].copy(),
        }

        def step(index: int) -> None:
            plan.steps[index % SCHEDULE].run(request)

        step(0)
        output = plan.steps[0].results["model_output"]
        timestep = call.inputs["timestep"]  # of the step that ran last
        np.savez(shared, output=output, timestep=timestep, **given)
        serve(connection, step, {"error": 0.0})


def torch_eager(connection: Connection, folder: str, shared: str, threads: int) -> None:
    """Steps as diffusers' pipeline makes them."""
    import numpy as np
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    if threads:
        torch.set_num_threads(threads)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    given = {name: torch.from_numpy(array) for name, array in np.load(shared).items()}
    scheduler.set_timesteps(SCHEDULE)
    sample, outputs = given["sample"], []

    @torch.inference_mode()
    def step(index: int) -> None:
        nonlocal sample
        timestep = scheduler.timesteps[index % SCHEDULE]
        rows = scheduler.scale_model_input(torch.cat([sample] * 2), timestep)
        prediction = unet(rows, timestep, encoder_hidden_states=given["hidden"], return_dict=False)[0]
        negative, positive = prediction.chunk(2)
        output = negative + GUIDANCE * (positive - negative)
        outputs[:] = [output]
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]

    assert float(given["timestep"]) == float(scheduler.timesteps[0])
    step(0)
    error = float((outputs[0] - given["output"]).norm() / outputs[0].norm())
    serve(connection, step, {"error": error, "threads": torch.get_num_threads()})


def serve(connection: Connection, step: Callable[[int], None], first: dict[str, Any]) -> None:
    """Answers every message with the seconds of one step, on the clock and of the processor, and the peak memory."""
    connection.send(first)
    index = 0
    while connection.recv():
        index += 1
        start, processor = time.perf_counter(), time.process_time()
        step(index)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        connection.send({"seconds": seconds, "processor": processor, "peak_bytes": peak_bytes()})


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A process that runs ``target(connection, *arguments)`` until the block ends; gives the other end."""
    context = multiprocessing.get_context("spawn")  # a fork would share memory
    here, there = context.Pipe()
    child = context.Process(target=target, args=(there, *arguments), daemon=True)
    child.start()
    there.close()
    try:
        yield here
        here.send(False)
        child.join(30)
    finally:
        child.terminate()
        child.join()


def measure(scratch: Path, part: str, rounds: int, threads: int) -> dict[str, Any]:
    """Compiles below ``scratch``, runs both in turn, and says what was found."""
    source = scratch / "pipeline"
    models.make(source, part)
    bundle = compiled(source, scratch / "plain.bundle")
    shared = scratch / "shared.npz"
    times: dict[str, list[float]] = {"trimtab": [], "torch": []}
    processor: dict[str, list[float]] = {"trimtab": [], "torch": []}
    peaks = {}
    with process(ours, str(bundle), str(shared), threads) as first:
        first.recv()  # torch reads what this one wrote
        with process(torch_eager, str(source), str(shared), threads) as second:
            torch = second.recv()
            for _ in range(rounds):
                for name, connection in (("trimtab", first), ("torch", second)):
                    connection.send(True)
                    answer = connection.recv()
                    times[name].append(1000 * answer["seconds"])
                    processor[name].append(1000 * answer["processor"])
                    peaks[name] = answer["peak_bytes"]
    ratios = [a / b for a, b in zip(times["trimtab"], times["torch"], strict=True)]
    return {
        "trimtab_ms": spread(times["trimtab"]),
        "torch_ms": spread(times["torch"]),
        "ratio": statistics.median(times["trimtab"]) / statistics.median(times["torch"]),
        "ratios": spread(ratios),
        "processor_ms": {name: spread(values) for name, values in processor.items()},
        "goal": GOAL,
        "peak_bytes": peaks,
        "relative_error": torch["error"],
        "threads": {"torch": torch["threads"], "trimtab": threads or "one a core"},
        **conditions(rounds),
        "versions": {name: version(name) for name in ("torch", "diffusers", "onnxruntime")},
    }


def compiled(source: Path, bundle: Path, *options: str) -> Path:
    """A pipeline's bundle of `SCHEDULE` steps, compiled in a process of its own, whose memory is gone behind it."""
    command = [sys.executable, "-m", "trimtab", "compile", str(source), "--steps", str(SCHEDULE), *options]
    subprocess.run([*command, "-o", str(bundle)], check=True, stdout=subprocess.DEVNULL)
    return bundle


def counts_of(connection: Connection, bundle: str) -> None:
    """Says what each of a bundle's first two steps multiplies, and the denoiser's parameters and their bytes."""
    from trimtab.calibration.course import step_macs
    from trimtab.runtime.load import load

    with load(bundle) as pipe:
        _, plan, _ = pipe.prepare("a red circle", seed=0, guidance=GUIDANCE)
        named = pipe.bundle.contents.segments.items()
        parts = [segment for name, segment in named if name.startswith("denoiser")]
        found = {
            "macs": [step_macs(pipe, plan.steps[index].calls) for index in (0, 1)],
            "weight_bytes": sum(part.weight_bytes for part in parts),
            "parameters": sum(part.parameters for part in parts),
        }
        connection.send(found)
        connection.recv()


def counted(bundle: Path) -> dict[str, Any]:
    """`counts_of` in a process of its own, as it reads graphs that the steps' memory is not to include."""
    with process(counts_of, str(bundle)) as connection:
        found: dict[str, Any] = connection.recv()
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, middle and largest of some measurements."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def between(values: dict[str, float]) -> str:
    """The smallest and the largest of a `spread` of seconds."""
    return f"[{values['min']:.2f} .. {values['max']:.2f}]"


def conditions(rounds: int) -> dict[str, Any]:
    """What a measurement was made under."""
    return {
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "command": " ".join(["python", *sys.argv]),
    }


def told(result: dict[str, Any]) -> str:
    """The `conditions` in a result, and its threads where it names a number of them, in a line."""
    threads = result["threads"]
    used = "" if isinstance(threads, dict) else f"threads: {threads}, "
    return (
        f"{result['rounds']} rounds, {used}{result['cores']} cores, load average {result['load_average']:.1f}"
    )


def _show(result: dict[str, Any]) -> None:
    for name in ("trimtab", "torch"):
        ms, peak = result[f"{name}_ms"], result["peak_bytes"][name]
        numbers = f"{ms['median']:10.1f} ms a step  [{ms['min']:.1f} .. {ms['max']:.1f}]"
        print(f"{name:8}{numbers}  {peak / 1e6:8.1f} MB at most")
    ratios = result["ratios"]
    print(f"ratio of the medians  {result['ratio']:.3f} (goal: {GOAL})")
    print(f"ratio of the rounds   {ratios['median']:.3f}  [{ratios['min']:.3f} .. {ratios['max']:.3f}]")
    used = {name: values["median"] for name, values in result["processor_ms"].items()}
    print(
        f"processor time        {used['trimtab']:.1f} against {used['torch']:.1f} ms, "
        f"ratio {used['trimtab'] / used['torch']:.3f}"
    )
    print(f"relative difference of the guided prediction  {result['relative_error']:.1e}")
    print(told(result))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each (default 5)")
    parser.add_argument(
        "--part", choices=("unet", "none"), default="unet", help="none: a tiny one, as a check"
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of each (default: one a core)")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        result = measure(Path(folder), arguments.part, arguments.rounds, arguments.threads)
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(result)


if __name__ == "__main__":
    main()
