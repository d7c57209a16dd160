"""Packing a program's denoiser: k-means, and calibration where there is time for it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.calibration.codebooks import Codebooks, CodebookStore
from trimtab.calibration.draft import draft
from trimtab.calibration.kmeans import Settings, make_codebooks
from trimtab.calibration.trajectories import own_requests, record
from trimtab.errors import InputError
from trimtab.export.source import Source
from trimtab.passes.vq import pack_weights
from trimtab.program import Program

logger = logging.getLogger(__name__)

TRAJECTORIES = 16
"""Recorded for a calibration, each of every step: 16 pictures from noise to the end."""

TOGETHER = 8
"""Pictures of one recorded evaluation."""

Progress = Callable[[str], None]


def packed(
    program: Program,
    settings: Settings,
    folder: Path,
    *,
    source: Source | None = None,
    minutes: float | None = None,
    store: Path | None = None,
    progress: Progress = logger.info,
) -> Program:
    """A program with packed weights.

    Args:
        program: Its graphs are edited.
        settings: Of the codebooks.
        folder: Where the program is run from, for its trajectories: a bundle in the making.
        source: The pipeline that it was exported from; only its denoiser can be trained.
        minutes: Of calibration; None for k-means alone.
        store: Where the codebooks are kept, calibrated ones in a folder within.
        progress: Told what is being worked on.

    Raises:
        InputError: A calibration of what was not exported from a pipeline; a rule that fits no layer.
        CalibrationError: See `make_codebooks` and `trimtab.calibration.vq4dit.calibrate`.
    """
    if minutes is not None and source is None:
        raise InputError(
            "calibration trains the pipeline's own model, and .onnx files hold none: leave it out"
        )
    models = {name: s.model for name, s in program.segments.items() if name.startswith("denoiser")}
    books = make_codebooks(models, settings, store, progress=progress)
    own = [name for name in models if any(layer.startswith(f"{name}/") for layer in books.layers)]
    if minutes is not None and own:
        raise InputError(
            f"calibration trains the pipeline's own weights, and {own[0]} has others: leave it out"
        )
    if minutes is None or source is None:
        logger.info("weights are packed by k-means alone: calibration brings quality back")
    elif books.layers:
        books = _calibrated(program, books, source, minutes, folder, store, progress)
    return pack_weights(program, books)


def _calibrated(
    program: Program,
    books: Codebooks,
    source: Source,
    minutes: float,
    folder: Path,
    store: Path | None,
    progress: Progress,
) -> Codebooks:
    from trimtab.calibration.vq4dit import Training, calibrate, inputs_of
    from trimtab.export.denoisers import denoiser_module

    training = Training(minutes)
    files = None
    if store is not None:
        files = CodebookStore(store / "calibrated", books.fingerprint, dataclasses.asdict(training))
        if all(name in files for name in books.layers) and files.has_parameters():
            layers = {name: files.get(name) for name in books.layers}
            return dataclasses.replace(books, layers=layers, parameters=files.get_parameters())
    progress("recording trajectories")
    with draft(program, folder) as pipeline:
        samples = record(pipeline, _together(own_requests(pipeline, TRAJECTORIES)))
    module = denoiser_module(source)
    made = calibrate(module, books, inputs_of(module, samples), training, progress)
    if files is not None:
        for name, layer in made.layers.items():
            files.put(name, layer)
        files.put_parameters(made.parameters)
    return made


def _together(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests of one picture as requests of several."""
    groups = [requests[k : k + TOGETHER] for k in range(0, len(requests), TOGETHER)]
    return [{name: [request[name] for request in group] for name in group[0]} for group in groups]
