"""Scores of a model's layers, from the model itself to a file: what a long study does once."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from trimtab.apart import export_apart
from trimtab.calibration.planning import Calibration, score_layers
from trimtab.calibration.sensitivity import Progress, asked_for
from trimtab.errors import InputError
from trimtab.export.source import find
from trimtab.recipe import make_recipe


def score(
    model: str | Path, calibration: Calibration, *, progress: Progress | None = None, **options: Any
) -> dict[str, Any]:
    """Measures what removing each layer costs, into ``calibration.log``.

    Args:
        model: A diffusers folder, a hub id, or a TOML file that names .onnx files.
        calibration: What to measure on, and the file.
        progress: Told (evaluations done, evaluations in all).
        **options: Fields of `trimtab.recipe.Recipe` that decide the trajectories: steps, scheduler, size.

    Returns:
        ``scores``: the file; ``samples``; ``seconds``; ``candidates``: each with ``name``, ``kind``,
        ``parameters``, ``loss`` (mean squared error of the prediction) and its standard ``error``, None where
        the schedule is so short that all samples are one.

    Raises:
        CalibrationError: The file holds no losses, or those of another model or of other samples.
    """
    if calibration.log is None:
        raise InputError("scores need a file to go to: give one")
    given = {name: value for name, value in options.items() if value is not None}
    make_recipe(given)  # what cannot be is said before anything is done
    asked_for(calibration.log)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="trimtab-") as temporary:
        folder = Path(temporary)
        program = export_apart(find(str(model)), given, folder)
        graph, scores = score_layers(program, calibration, folder, progress)
        candidates = graph.candidates
        return {
            "scores": str(calibration.log),
            "samples": len(graph.samples),
            "seconds": round(time.perf_counter() - start, 2),
            "candidates": [
                {
                    "name": name,
                    "kind": candidate.kind,
                    "parameters": candidate.parameters,
                    "loss": scores.mean(name),
                    "error": scores.error(name),
                }
                for name, candidate in candidates.items()
            ],
        }
