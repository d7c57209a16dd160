"""Packing a program's denoiser: k-means, and calibration where there is time for it."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trimtab.calibration.codebook_plan import Settings
from trimtab.calibration.codebook_store import CodebookStore
from trimtab.calibration.draft import draft, with_whole_texts
from trimtab.calibration.gates import OUTPUT
from trimtab.calibration.kmeans import make_codebooks
from trimtab.calibration.trajectories import own_requests, record
from trimtab.errors import InputError
from trimtab.passes import vq_op
from trimtab.passes.codebooks import CALIBRATED, FORMATS, Codebooks
from trimtab.passes.vq import pack_weights, sites
from trimtab.program import DENOISER, Program
from trimtab.weights import same_tensor

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
    minutes: float | None = None,
    store: Path | None = None,
    progress: Progress = logger.info,
) -> Program:
    """A program with packed weights.

    Args:
        program: Its graphs are edited.
        settings: Of the codebooks.
        folder: Where the program is run from, for its trajectories: a bundle in the making.
        minutes: Of calibration; None for k-means alone. Denoisers that steps switch between share them by the
            weights that each is the first to read.
        store: Where the codebooks are kept, calibrated ones in a folder within.
        progress: Told what is being worked on.

    Raises:
        InputError: A rule that fits no layer, or a graph too old for 3 bits.
        CalibrationError: See `make_codebooks` and `trimtab.calibration.vq4dit.calibrate`.
        PassError: Calibration of a graph with an operator that torch cannot run.
    """
    models = {name: s.model for name, s in program.segments.items() if name.startswith(DENOISER)}
    _check_opset(models, settings)
    if minutes is not None:
        _check_trainable(models.values())
    books = make_codebooks(models, settings, store, progress=progress)
    if not books.layers:
        logger.warning("no weight of the denoiser is packed: %s", _why_none(books))
    elif minutes is None:
        logger.info("weights are packed by k-means alone: calibration brings quality back")
    else:
        books = _calibrated(program, models, books, minutes, folder, store, progress)
    return pack_weights(program, books)


def _check_opset(models: Mapping[str, ir.Model], settings: Settings) -> None:
    wanted = {settings.bits, *(bits for _, bits in settings.rules)}
    six = any(form.index_bits == 6 for bits, form in FORMATS.items() if bits in wanted)
    for name, model in models.items():
        opset = model.opset_imports.get("", 0)
        if six and opset < vq_op.SIX_BIT_OPSET:
            raise InputError(
                f"{name} has opset {opset}, and weights of 3 bits need {vq_op.SIX_BIT_OPSET} or later: export it "
                "again, or pack to 2 or 4 bits"
            )


def _why_none(books: Codebooks) -> str:
    """Of most weights, and what to do."""
    if not books.kept:
        return (
            "none of float32 is read by MatMul, Gemm or Conv alone; export it in float32, or leave --vq out"
        )
    reason, count = Counter(books.kept.values()).most_common(1)[0]
    return (
        f"of {len(books.kept)}, {count} stay because {reason}; name layers with --vq-rule, or leave --vq out"
    )


def _check_trainable(models: Iterable[ir.Model]) -> None:
    """Before k-means, which takes minutes."""
    from trimtab.calibration.torch_graph import check_operators

    for model in models:
        check_operators(model, [OUTPUT])


def _calibrated(
    program: Program,
    models: Mapping[str, ir.Model],
    books: Codebooks,
    minutes: float,
    folder: Path,
    store: Path | None,
    progress: Progress,
) -> Codebooks:
    from trimtab.calibration.vq4dit import Training, calibrate

    training = Training(minutes)
    files = None
    if store is not None:
        files = CodebookStore(store / CALIBRATED, books.fingerprint, dataclasses.asdict(training))
        if all(name in files for name in books.layers) and files.has_parameters():
            layers = {name: files.get(name) for name in books.layers}
            return dataclasses.replace(books, layers=layers, parameters=files.get_parameters())
    progress("recording trajectories")
    with draft(with_whole_texts(program), folder) as pipeline:
        samples = record(pipeline, _together(own_requests(pipeline, TRAJECTORIES)))
    whole = sum(layer.codes.size for layer in books.layers.values())
    for name, model in models.items():
        given = _of(models, name, books)
        todo = sum(layer.codes.size for layer in given.layers.values() if layer.method != CALIBRATED)
        inputs = [sample.unguided for sample in samples if sample.segment == name]
        if todo and not inputs:
            logger.warning("%s is packed by k-means alone: no step of the recorded schedule calls it", name)
        elif todo:
            share = dataclasses.replace(training, minutes=minutes * todo / whole)
            made = calibrate(model, given, inputs, share, progress)
            books = _merged(models, name, books, made)
    if files is not None:
        for name, layer in books.layers.items():
            files.put(name, layer)
        files.put_parameters(books.parameters)
    return books


def _of(models: Mapping[str, ir.Model], segment: str, books: Codebooks) -> Codebooks:
    """What one denoiser's weights are so far, by its own names; what it has no part in is left out."""
    model, own = models[segment], books.of(segment)
    layers = {site.name: own.layers[site.name] for site in sites(model) if site.name in own.layers}
    held = {name: array for name, array in own.parameters.items() if name in model.graph.initializers}
    return dataclasses.replace(own, layers=layers, parameters=held)


def _merged(models: Mapping[str, ir.Model], segment: str, books: Codebooks, made: Codebooks) -> Codebooks:
    """All codebooks with what was trained for one denoiser; a bias is trained for all that have the same one."""

    def keyed(name: str) -> str:
        return f"{segment}/{name}" if f"{segment}/{name}" in books.layers else name

    layers = {keyed(name): layer for name, layer in made.layers.items()}
    parameters = {
        f"{other}/{name}": array
        for name, array in made.parameters.items()
        for other, model in models.items()
        if (bias := model.graph.initializers.get(name)) is not None
        and same_tensor(bias.const_value, models[segment].graph.initializers[name].const_value)
    }
    return dataclasses.replace(
        books, layers={**books.layers, **layers}, parameters={**parameters, **books.parameters}
    )


def _together(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests of one picture as requests of several; where nothing is asked for, their number says how many."""
    groups = [requests[k : k + TOGETHER] for k in range(0, len(requests), TOGETHER)]
    merged: list[dict[str, Any]] = [
        {n: [r[n] for r in g] if n in ("prompt", "label", "seed") else value for n, value in g[0].items()}
        for g in groups
    ]
    return [m if {"prompt", "label"} & m.keys() else {**m, "count": len(m["seed"])} for m in merged]
