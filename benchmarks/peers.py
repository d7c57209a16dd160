"""What a picture of Stable Diffusion 1.5 takes on the CPU, in trimtab and in the tools that people use for it today.

    python benchmarks/peers.py [--optimum PYTHON] [--cpp PYTHON] [--cpp-type TYPE]... [--vq BITS]... [--steps N]
        [--rounds N] [--threads N] [--scratch FOLDER] [--codebooks FOLDER] [--json]

The whole pipeline (random weights, FP32) draws one picture of 512x512 pixels with guidance, in diffusers with torch and
in trimtab, and where an interpreter is named that has them, in optimum's ONNX Runtime pipeline and in
stable-diffusion.cpp. Those two want packages of other versions than trimtab's, so each has an environment of its own:

    python -m venv opt && opt/bin/pip install torch optimum-onnx onnxruntime diffusers==0.35.2 transformers==4.57.1
    python -m venv cpp && cpp/bin/pip install stable-diffusion-cpp-python

Each picture is drawn in a process of its own, and the tools take turns. A step is the median of all but a picture's
first; the rest of a picture is loading, the texts and the decoder; converting is done once. Pictures are held against
diffusers', but for stable-diffusion.cpp's, whose tokenizer is its own. `--vq 2` packs trimtab's weights as well, which
takes minutes. Takes 25 GB of disk and 16 GB of memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GUIDANCE = 7.5
SIDE = 512
PROMPT = "a red circle"

Drawn = dict[str, Any]
"""``step_s``, ``rest_s`` (loading, texts, decoder) and ``peak_bytes``."""


def eager(folder: Path, steps: int, threads: int, picture: Path) -> Drawn:
    """Draws with diffusers in torch."""
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(threads)
    start = time.perf_counter()
    return _with_diffusers(StableDiffusionPipeline.from_pretrained(folder), start, steps, picture)


def optimum(folder: Path, steps: int, threads: int, picture: Path) -> Drawn:
    """Draws with optimum's pipeline of ONNX Runtime sessions."""
    import onnxruntime
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    start = time.perf_counter()
    pipe = ORTStableDiffusionPipeline.from_pretrained(folder, session_options=options)
    return _with_diffusers(pipe, start, steps, picture)


def _with_diffusers(pipe: Any, start: float, steps: int, picture: Path) -> Drawn:
    import numpy as np
    import torch

    ends: list[float] = []

    def on_step(pipe: Any, index: int, timestep: Any, kept: Any) -> Any:
        ends.append(time.perf_counter())
        return kept

    noise = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0))
    drawn = pipe(
        PROMPT,
        height=SIDE,
        width=SIDE,
        guidance_scale=GUIDANCE,
        num_inference_steps=steps,
        latents=noise,
        output_type="np",
        callback_on_step_end=on_step,
    ).images
    result = _drawn(start, ends)
    np.save(picture, drawn[0])
    return result


def cpp(folder: Path, steps: int, threads: int, picture: Path) -> Drawn:
    """Draws with stable-diffusion.cpp, with weights of the type that the folder is named after."""
    from stable_diffusion_cpp import StableDiffusion

    ends: list[float] = []

    def on_step(step: int, steps: int, seconds: float) -> None:
        if step:
            ends.append(time.perf_counter())

    start = time.perf_counter()
    pipe = StableDiffusion(
        model_path=str(folder.resolve()), wtype=folder.name, n_threads=threads, verbose=False
    )
    drawn = pipe.generate_image(
        prompt=PROMPT,
        width=SIDE,
        height=SIDE,
        cfg_scale=GUIDANCE,
        sample_method="euler",
        sample_steps=steps,
        seed=0,
        progress_callback=on_step,
    )
    result = _drawn(start, ends[:steps])
    drawn[0].save(picture.with_suffix(".png"))
    return result


def trimtab(folder: Path, steps: int, threads: int, picture: Path) -> Drawn:
    """Draws a bundle."""
    import numpy as np

    from trimtab.runtime.load import load

    ends: list[float] = []
    start = time.perf_counter()
    with load(folder, threads=threads) as pipe:
        drawn = pipe(
            PROMPT,
            seed=0,
            guidance=GUIDANCE,
            on_step=lambda done, total: ends.append(time.perf_counter()),
        )
        result = _drawn(start, ends)
    np.save(picture, drawn.pixels[0])
    return result


def _drawn(start: float, ends: list[float]) -> Drawn:
    """What was measured: at the end of a picture, from the times at which its steps ended."""
    from trimtab.runtime.bench import peak_bytes

    whole = time.perf_counter() - start
    step_s = statistics.median(after - before for before, after in itertools.pairwise(ends))
    return {"step_s": step_s, "rest_s": whole - len(ends) * step_s, "peak_bytes": peak_bytes()}


TOOLS: dict[str, Callable[[Path, int, int, Path], Drawn]] = {
    "diffusers": eager,
    "optimum": optimum,
    "stable-diffusion.cpp": cpp,
    "trimtab": trimtab,
}


class Way(NamedTuple):
    """A tool, the model in the form that it loads, and what making that took."""

    name: str
    tool: str
    python: str
    folder: Path
    convert_s: float = 0.0

    def draw(self, steps: int, threads: int, picture: Path) -> Drawn:
        """One picture, in a process of its own."""
        asked = [self.tool, str(self.folder), str(steps), str(threads), str(picture)]
        command = [self.python, __file__, "--draw", *asked]
        # Other interpreters have no trimtab, and need its count of memory; that part of it needs no package.
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{self.name} failed:\n{done.stderr[-2000:]}")
        answer: Drawn = json.loads(done.stdout.splitlines()[-1])  # below what the tools print themselves
        return answer


def make_pipeline(folder: Path) -> None:
    """Stable Diffusion 1.5 with random weights, in files such as the published ones, which all four tools read."""
    import models
    from safetensors.torch import load_file, save_file

    models.make(folder, "whole")
    tokenizer = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    (folder / "tokenizer/vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    file = folder / "text_encoder/model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def make_ways(scratch: Path, arguments: argparse.Namespace) -> list[Way]:
    """Converts the model for every tool that is there."""
    source = scratch / "pipeline"
    make_pipeline(source)
    ways = [Way("diffusers, torch", "diffusers", sys.executable, source)]
    if arguments.optimum:
        out = scratch / "optimum"
        export = ["-m", "optimum.commands.optimum_cli", "export", "onnx", "--task", "text-to-image"]
        took = _run([arguments.optimum, *export, "-m", str(source), str(out)])
        ways.append(Way("optimum", "optimum", arguments.optimum, out, took))
    for kind in arguments.cpp_type if arguments.cpp else ():
        folder = scratch / kind
        folder.symlink_to(source)
        ways.append(Way(f"stable-diffusion.cpp, {kind}", "stable-diffusion.cpp", arguments.cpp, folder))
    for bits in ("", *arguments.vq):
        out = scratch / f"trimtab{bits}.bundle"
        packed = ["--vq", bits, "--vq-codebooks", str(arguments.codebooks or scratch / "codebooks")]
        command = [sys.executable, "-m", "trimtab", "compile", str(source), "--steps", str(arguments.steps)]
        took = _run([*command, *(packed if bits else ()), "-o", str(out)])
        name = f"trimtab, --vq {bits}" if bits else "trimtab"
        ways.append(Way(name, "trimtab", sys.executable, out, took))
    return ways


def _run(command: list[str]) -> float:
    """Runs a command and gives the seconds that it took."""
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return time.perf_counter() - start


def measure(
    ways: Sequence[Way], steps: int, rounds: int, threads: int, scratch: Path
) -> list[dict[str, Any]]:
    """A row for each way: medians over the rounds, and how far its picture is from diffusers'."""
    from export import disk_bytes

    drawn: list[list[Drawn]] = [[] for _ in ways]
    pictures = [scratch / f"{number}.npy" for number in range(len(ways))]
    for _ in range(rounds):
        for way, picture, results in zip(ways, pictures, drawn, strict=True):
            print(f"{way.name} ...", file=sys.stderr, flush=True)
            results.append(way.draw(steps, threads, picture))
    return [
        {
            "name": way.name,
            "convert_s": way.convert_s,
            "disk_bytes": disk_bytes(way.folder.resolve()),
            **{what: statistics.median(result[what] for result in results) for what in results[0]},
            "difference": difference(pictures[0], picture),
        }
        for way, picture, results in zip(ways, pictures, drawn, strict=True)
    ]


def difference(first: Path, second: Path) -> float | None:
    """The largest between two pictures, on a scale of 0 to 1; None where the second is in no file."""
    import numpy as np

    return float(np.abs(np.load(first) - np.load(second)).max()) if second.exists() else None


def _show(rows: list[dict[str, Any]]) -> None:
    print(
        "| tool | convert, s | disk, MB | a step, s | the rest of a picture, s | peak memory, MB | difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        far = "" if row["difference"] is None else f"{row['difference']:.0e}"
        print(
            f"| {row['name']} | {row['convert_s']:.0f} | {row['disk_bytes'] / 1e6:.0f} "
            f"| {row['step_s']:.2f} | {row['rest_s']:.1f} | {row['peak_bytes'] / 1e6:.0f} | {far} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimum", metavar="PYTHON", help="an interpreter that has optimum-onnx")
    parser.add_argument("--cpp", metavar="PYTHON", help="one that has stable-diffusion-cpp-python")
    parser.add_argument(
        "--cpp-type", action="append", metavar="TYPE", help="of its weights: f32, q8_0, q2_K, ..."
    )
    parser.add_argument(
        "--vq", action="append", default=[], metavar="BITS", help="trimtab's weights, packed, too"
    )
    parser.add_argument("--codebooks", type=Path, help="where packed weights are kept for another run")
    parser.add_argument("--steps", type=int, default=4, help="of a picture, two or more (default 4)")
    parser.add_argument("--rounds", type=int, default=1, help="pictures of each (default 1)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core"
    )
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--draw", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.draw:
        tool, folder, steps, threads, picture = arguments.draw
        print(json.dumps(TOOLS[tool](Path(folder), int(steps), int(threads), Path(picture))))
        return
    from step import conditions, told  # what draws has no need of it, and may lack what it imports

    arguments.cpp_type = arguments.cpp_type or ["f32"]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        ways = make_ways(scratch, arguments)
        rows = measure(ways, arguments.steps, arguments.rounds, arguments.threads, scratch)
    result = {"rows": rows, "steps": arguments.steps, "threads": arguments.threads}
    result |= conditions(arguments.rounds)
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(rows)
        print(f"{arguments.steps} steps, {told(result)}")


if __name__ == "__main__":
    main()
