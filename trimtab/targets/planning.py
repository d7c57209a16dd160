"""`trimtab plan`: from a model or a bundle to the answer whether it fits."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.bundle import MANIFEST, open_bundle
from trimtab.storage import read_program
from trimtab.targets.device import find_device
from trimtab.targets.estimate import plan
from trimtab.targets.precision import choose_precision
from trimtab.targets.verdict import refuse


def plan_model(
    model: str | Path,
    target: str,
    *,
    size: tuple[int, int] | None = None,
    precision: str | None = None,
    low_memory: bool = False,
    device_file: str | Path | None = None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """What ``trimtab plan --json`` prints.

    A model is exported into a temporary folder first, as `trimtab.compile` does, with its weights in float32; nothing
    of it stays.

    Args:
        model: A bundle's folder, or what `trimtab.compile` takes.
        target: A device's name.
        size: (width, height) in pixels; None for the native one.
        precision: Of the engines; None for the target's default.
        low_memory: Reckon with the engines of one stage at a time.
        device_file: A TOML file with devices of one's own.
        progress: Told what is being worked on.

    Raises:
        InputError: No such device, size or precision, or no such model.
        TargetError: It does not fit; the line says what would.
    """
    device = find_device(target, device_file)
    chosen = choose_precision(precision, device)
    with tempfile.TemporaryDirectory(prefix="trimtab-plan-") as scratch:
        folder = Path(model)
        if not (folder / MANIFEST).is_file():
            from trimtab.compiler import compile

            progress("exporting")
            folder = Path(scratch) / "plan.bundle"
            compile(model, folder, targets=("cpu",), cache=None, progress=progress)
        bundle = open_bundle(folder)
        program = read_program(bundle)
        progress("planning")
        result = plan(program, bundle.contents, device, precision=chosen, size=size)
        if not result.fits(low_memory):
            raise refuse(result, program, bundle.contents, device, low_memory=low_memory)
    return dataclasses.asdict(result) | {
        "model": str(model),
        "fits": True,
        "low_memory": low_memory,
        "largest": [{"name": name, "bytes": size} for name, size in result.largest()],
    }
