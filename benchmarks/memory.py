"""What --low-memory and --tile save: the peak memory of one picture, each in a process of its own.

    python benchmarks/memory.py BUNDLE [--size WxH] [--tile N] [--schedule NAME] [--target NAME]
        [--provider NAME] [--json]

Resident pages of the process at their most, once all steps are done and once the picture is: the difference is the
decoder's. How far the tiled picture is from the whole one is printed too. With weights that were not trained, as
`benchmarks/models.py` makes them, that says nothing about pictures; memory and time are those of trained ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np


def draw(
    connection: Connection,
    bundle: Path,
    size: tuple[int, int] | None,
    schedule: str | None,
    options: dict[str, Any],
) -> None:
    """Draws one picture and says what it took."""
    from trimtab.runtime.bench import peak_bytes
    from trimtab.runtime.load import load

    steps = {}

    def on_step(done: int, total: int) -> None:
        steps["peak"], steps["end"] = peak_bytes(), time.perf_counter()

    with load(bundle, **options) as pipe:
        kinds = {spec.source.get("kind") for spec in pipe.bundle.contents.tasks[pipe.tasks[0]].inputs}
        what = {"prompt": "a red circle"} if "tokens" in kinds else {"label": 0} if "label" in kinds else {}
        start = time.perf_counter()
        pixels = pipe(**what, seed=0, size=size, schedule=schedule, on_step=on_step).pixels
        end = time.perf_counter()
    connection.send(
        {
            "steps_bytes": steps["peak"],
            "peak_bytes": peak_bytes(),
            "picture_s": end - start,
            "decoder_s": end - steps["end"],
            "pixels": pixels,
        }
    )


def measure(
    bundle: Path,
    size: tuple[int, int] | None,
    schedule: str | None,
    tile: int | None,
    options: dict[str, Any],
) -> Any:
    """One row for each way to run it."""
    ways: dict[str, dict[str, Any]] = {"as it is": {}, "--low-memory": {"low_memory": True}}
    if tile is not None:
        ways |= {f"--tile {tile}": {"tile": tile}}
        ways |= {f"--low-memory --tile {tile}": {"low_memory": True, "tile": tile}}
    context = multiprocessing.get_context("spawn")  # a fork would count this process's memory too
    rows: list[dict[str, Any]] = []
    whole = None
    for name, way in ways.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=draw, args=(theirs, bundle, size, schedule, options | way))
        process.start()
        theirs.close()
        row = ours.recv()
        process.join()
        pixels = row.pop("pixels")
        whole = pixels if whole is None else whole
        off = np.abs(pixels - whole)
        rows.append({"way": name, **row, "difference": {"mean": float(off.mean()), "max": float(off.max())}})
    return {"bundle": str(bundle), "size": list(pixels.shape[2:0:-1]), "ways": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", metavar="WxH", help="size in pixels (default: the native one)")
    parser.add_argument("--tile", type=int, metavar="N", help="side of a tile in pixels")
    parser.add_argument("--schedule", metavar="NAME", help="one of the bundle, or its number of steps")
    parser.add_argument("--target", metavar="NAME")
    parser.add_argument("--provider", metavar="NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    width, _, height = (arguments.size or "").partition("x")
    size = (int(width), int(height)) if arguments.size else None
    options = {"target": arguments.target, "provider": arguments.provider}
    result = measure(arguments.bundle, size, arguments.schedule, arguments.tile, options)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['bundle']}, {result['size'][0]}x{result['size'][1]}")
    print(
        f"{'':28}{'after the steps':>16}{'in all':>12}{'picture':>11}{'decoder':>11}   off the whole, mean and max"
    )
    for row in result["ways"]:
        mega = [f"{row[name] / 1e6:9.0f} MB" for name in ("steps_bytes", "peak_bytes")]
        seconds = [f"{row[name]:9.2f} s" for name in ("picture_s", "decoder_s")]
        off = row["difference"]
        print(
            f"{row['way']:28}    {mega[0]}{mega[1]}{seconds[0]}{seconds[1]}   {off['mean']:.1e} {off['max']:.1e}"
        )


if __name__ == "__main__":
    main()
