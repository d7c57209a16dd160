"""Compile the shipped model, draw with it, and hold it against diffusers: what `make demo` runs.

    python samples/01_shapes/run.py [--out demo]

Each side draws the same prompts with the same seed in a process of its own, so that the memory is its own. Prints a
table of before (diffusers and torch) and after (trimtab), and writes both rows of pictures to OUT/picture.png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from trimtab.runtime.bench import peak_bytes

MODEL = Path(__file__).parent / "models" / "shapes-sd"
PROMPTS = (
    "a large red circle at the top left on a white background",
    "a small blue star at the center on a black background",
    "a large green square at the bottom right on a white background",
    "a large yellow triangle at the top right and a small red circle at the bottom left on a black background",
)
STEPS = 20
SEED = 0


def with_diffusers() -> dict[str, Any]:
    """Seconds to load, seconds a step, and the pictures, as diffusers does it."""
    warnings.simplefilter("ignore", FutureWarning)  # of names that they are about to change
    start = time.perf_counter()
    import torch
    import transformers

    transformers.logging.set_verbosity_error()  # at its import diffusers asks it for what only other models need
    transformers.logging.disable_progress_bar()
    import diffusers
    from diffusers import StableDiffusionPipeline

    diffusers.utils.logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    loaded = time.perf_counter()

    def draw(prompt: str, each: Callable[[], None]) -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(SEED)
        return pipe(
            prompt,
            num_inference_steps=STEPS,
            generator=generator,
            output_type="np",
            callback_on_step_end=lambda _pipe, _step, _time, tensors: each() or tensors,
        ).images[0]

    return measured(loaded - start, draw)


def with_trimtab(bundle: Path) -> dict[str, Any]:
    """The same with the bundle."""
    start = time.perf_counter()
    import trimtab

    pipe = trimtab.load(bundle)
    pipe.prepare(PROMPTS[0], seed=SEED)
    loaded = time.perf_counter()

    def draw(prompt: str, each: Callable[[], None]) -> np.ndarray:
        return pipe(prompt, seed=SEED, on_step=lambda _done, _total: each()).pixels[0]

    return measured(loaded - start, draw)


def measured(load_s: float, draw: Callable[[str, Callable[[], None]], np.ndarray]) -> dict[str, Any]:
    """Draws every prompt; a step's time is the median between two steps' ends."""
    draw(PROMPTS[0], lambda: None)  # the first picture warms up
    steps, pictures = [], []
    for prompt in PROMPTS:
        ends: list[float] = []
        pictures.append(draw(prompt, lambda ends=ends: ends.append(time.perf_counter())))
        steps += list(np.diff(ends))
    step_ms = 1000 * float(np.median(steps))
    return {"load_s": load_s, "step_ms": step_ms, "peak": peak_bytes(), "pictures": pictures}


def in_its_own_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    # A multiprocessing.Pool would kill it, and its libraries' semaphores would be left over, with a warning.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    out: Path = parser.parse_args().out

    import trimtab

    start = time.perf_counter()
    print(f"compiling {MODEL.name} ...", flush=True)
    bundle = trimtab.compile(MODEL, out / "shapes.bundle", steps=(STEPS,))
    print(f"{bundle.folder}: compiled in {time.perf_counter() - start:.0f} s", flush=True)

    before, after = in_its_own_process(with_diffusers), in_its_own_process(with_trimtab, bundle.folder)
    rows = [np.concatenate(side["pictures"], axis=1) for side in (before, after)]
    sheet = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(out / "picture.png")

    table = Table(box=None, header_style="bold")
    for title in ("", "before: diffusers", "after: trimtab", "before / after"):
        table.add_column(title, justify="left" if not title else "right")
    for name, key, unit in (
        ("ready to draw, s", "load_s", 1),
        ("a step, ms", "step_ms", 1),
        ("peak memory, MB", "peak", 1e6),
    ):
        a, b = before[key] / unit, after[key] / unit
        table.add_row(name, f"{a:.1f}", f"{b:.1f}", f"{a / b:.1f}x")
    Console(width=90).print(table)
    worst = max(np.abs(a - b).max() for a, b in zip(before["pictures"], after["pictures"], strict=True))
    print(f"largest difference between the pictures, on a scale of 0 to 1: {worst:.1e}")
    print(f"{out / 'picture.png'}: above with diffusers, below with trimtab")


if __name__ == "__main__":
    main()
