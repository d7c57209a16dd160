"""Codebooks by k-means: by nothing but the weights' values."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.calibration.codebook_plan import Group, Settings, choose, plan
from trimtab.calibration.codebook_store import CodebookStore
from trimtab.errors import CalibrationError, MissingDependency
from trimtab.passes import vq_op
from trimtab.passes.codebooks import FORMATS, Codebooks, PackedWeight
from trimtab.passes.vq import Site, sites
from trimtab.weights import fingerprint, same_tensor

logger = logging.getLogger(__name__)

ITERATIONS = (80, 20)
"""Lloyd steps on a sample, then on all sub-vectors: 100 as in VQ4DiT. The sample finds the codewords, and what it
missed of them the rest mends."""

SAMPLE = 2048
"""Sub-vectors in the sample, for each codeword."""

_OVERSHOOT = 1.8
"""How far a codeword moves towards its mean, and beyond: the factor of Lee, Baek and Sung (Modified K-means algorithm
for vector quantizer design, IEEE Signal Processing Letters 4(1), 1997). It ends nearer to the best."""

_PLAIN = 3
"""Last steps of each part that move to the mean itself."""

_LEAST_VECTORS, _LEAST_LENGTH = 32768, 4
"""From these sizes on, faiss 1.15 has a search that takes a twelfth of the time: less is filled up with zeros."""

Progress = Callable[[str], None]


def make_codebooks(
    models: Mapping[str, ir.Model],
    settings: Settings,
    store: Path | None = None,
    *,
    threads: int = 0,
    progress: Progress = logger.info,
) -> Codebooks:
    """Packs the denoiser's weights by k-means.

    Args:
        models: Its graphs, by segment.
        settings: The user's.
        store: A folder where every weight is kept as soon as it is done, and found again.
        threads: Weights at a time; 0 for one a core. The result does not depend on it.
        progress: Told which weight is done.

    Raises:
        InputError: A rule that fits no layer.
        CalibrationError: A weight that is not finite; a store of another model or other settings.
        MissingDependency: faiss is not installed.
    """
    _faiss()  # a thread that cannot start says nothing of why
    found = _distinct(models)
    choices = choose(found, settings)
    for name, choice in choices.items():
        if not isinstance(choice, str) and not _finite(found[name].rows()):
            raise CalibrationError(f"{name} holds numbers that are not finite: mend the model's weights")
    mark = fingerprint((name, site.rows()) for name, site in found.items())  # whichever the settings pick
    kept = {name: choice for name, choice in choices.items() if isinstance(choice, str)}
    noted = {"bits": settings.bits, "rules": settings.rules, "scale": settings.scale, "seed": settings.seed}
    files = None if store is None else CodebookStore(store, mark, noted)

    def one(group: Group) -> dict[str, PackedWeight]:
        first, *others = group.names
        if files is not None and all(name in files for name in group.names):
            return {name: files.get(name) for name in group.names}
        rows = [found[name].rows() for name in group.names]
        packed = pack(rows, group.bits, group.codewords, scaled=settings.scale, seed=settings.seed)
        made = dict(zip(group.names, packed, strict=True))
        if files is not None:
            for name, weight in made.items():
                files.put(name, weight)
        progress(f"k-means of {first}{f' and {len(others)} more' if others else ''}")
        return made

    # A codebook a thread: threads that share one wait for each other at every step, and most weights are small.
    pool = ThreadPoolExecutor(threads or os.cpu_count(), initializer=_alone)
    try:
        parts = list(pool.map(one, plan(found, choices, settings)))
    finally:
        pool.shutdown(cancel_futures=True)
    layers = {name: weight for part in parts for name, weight in part.items()}
    return Codebooks(mark, {name: layers[name] for name in found if name in layers}, kept)


def _distinct(models: Mapping[str, ir.Model]) -> dict[str, Site]:
    """Every weight once, as `Codebooks.layers` names them.

    One name is mostly one parameter, in however many segments it stands; a student's, or a mixture's at another time
    step, has other numbers.
    """
    found: dict[str, Site] = {}
    for segment, model in models.items():
        for site in sites(model):
            first = found.setdefault(site.name, site)
            if not same_tensor(first.value.const_value, site.value.const_value):
                found[f"{segment}/{site.name}"] = site
    return found


def pack(
    weights: Sequence[npt.NDArray[Any]], bits: int, codewords: int, *, scaled: bool = False, seed: int = 0
) -> list[PackedWeight]:
    """Packs weights with one codebook for all of them.

    Args:
        weights: Each (O, n), the input channels innermost, finite.
        bits: A key of `FORMATS`.
        codewords: Of the codebook; no more than there are sub-vectors.
        scaled: Divides every row by its root mean square first.
        seed: Of the sample and the first codewords.

    Raises:
        CalibrationError: Fewer sub-vectors than codewords.
        MissingDependency: faiss is not installed.
    """
    shape = FORMATS[bits]
    weights = [np.asarray(rows, np.float32) for rows in weights]
    scales = [_row_scales(rows) if scaled else None for rows in weights]
    vectors = [
        vq_op.cut(rows if scale is None else rows / scale[:, None], shape.length)
        for rows, scale in zip(weights, scales, strict=True)
    ]
    flat = [np.ascontiguousarray(own.reshape(-1, shape.length)) for own in vectors]
    codebook = rounded(cluster(np.concatenate(flat) if len(flat) > 1 else flat[0], codewords, seed=seed))
    packed = []
    for rows, scale, own, mine in zip(weights, scales, vectors, flat, strict=True):
        indices = nearest(mine, codebook).astype(np.uint8).reshape(own.shape[:2])
        codes = vq_op.pack_indices(indices, shape.index_bits)
        packed.append(with_error(PackedWeight(bits, codes, codebook, scale, rows.shape[1], error=0.0), rows))
    return packed


def _row_scales(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(O,) the root mean square of every row; 1 for one of zeros."""
    scale: npt.NDArray[np.float32] = np.sqrt(np.square(rows, dtype=np.float64).mean(1)).astype(np.float32)
    scale[scale == 0] = 1.0
    return scale


def with_error(packed: PackedWeight, rows: npt.NDArray[np.float32]) -> PackedWeight:
    """The packed weight with its error measured against the rows that it stands for."""
    power = float(np.square(rows, dtype=np.float64).sum())
    lost = float(np.square(packed.rows() - rows, dtype=np.float64).sum())
    return replace(packed, error=lost / power if power else 0.0)


def cluster(
    vectors: npt.NDArray[np.float32],
    count: int,
    *,
    seed: int = 0,
    iterations: tuple[int, int] = ITERATIONS,
    sample: int = SAMPLE,
) -> npt.NDArray[np.float32]:
    """Lloyd's k-means with moves of `_OVERSHOOT`, first on a sample and then on everything.

    Args:
        vectors: (n, d) float32.
        count: Codewords; at most n.
        seed: Of the sample and the first codewords.
        iterations: On the sample, and on everything.
        sample: Vectors in the sample, for each codeword.

    Returns:
        (count, d) float32.

    Raises:
        CalibrationError: Fewer vectors than codewords.
        MissingDependency: faiss is not installed.
    """
    if len(vectors) < count:
        raise CalibrationError(
            f"{len(vectors)} sub-vectors were given for {count} codewords: ask for fewer codewords"
        )
    random = np.random.default_rng(seed)
    few = vectors
    if len(vectors) > sample * count:
        few = vectors[np.sort(random.choice(len(vectors), sample * count, replace=False))]
    codebook = few[random.choice(len(few), count, replace=False)]
    for part, steps in zip((few, vectors), iterations, strict=True):
        last, move = np.inf, _OVERSHOOT
        for left in range(steps, 0, -1):
            codes, distances = _search(part, codebook)
            total = float(distances.sum(dtype=np.float64))
            settled = total >= last * (1 - 1e-7)
            if settled and move == 1:
                break
            if settled or left <= _PLAIN:
                move = 1.0
            last = min(last, total)
            codebook = _moved(part, codes, distances, codebook, move)
    return codebook


def nearest(vectors: npt.NDArray[np.float32], codebook: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """(n,) the index of the nearest codeword of each vector (n, d)."""
    return _search(vectors, codebook)[0]


def neighbours(
    vectors: npt.NDArray[np.float32], codebook: npt.NDArray[np.float32], count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The nearest codewords of each vector and their squared distances, (n, count) each, nearest first."""
    distances, codes = _faiss().knn(vectors, codebook, count)
    return codes, distances


def rounded(codebook: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A codebook whose numbers FP16 holds, so that engines of both precisions decode the same weight.

    Where that would cost more than FP16's own relative precision (numbers beyond its range, or all of them tiny), the
    codebook stays as it is.
    """
    with np.errstate(over="ignore"):
        half = codebook.astype(np.float16).astype(np.float32)
    peak = np.abs(codebook).max(initial=0.0)
    fits = np.isfinite(half).all() and np.abs(half - codebook).max(initial=0.0) <= 2**-11 * peak
    return half if fits else codebook


def _search(
    vectors: npt.NDArray[np.float32], codebook: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Nearest codeword and squared distance of each vector, to float32's rounding."""
    missing = ((0, max(0, _LEAST_VECTORS - len(vectors))), (0, _LEAST_LENGTH - vectors.shape[1]))
    codewords = np.pad(codebook, ((0, 0), missing[1]))
    distances, codes = _faiss().knn(np.pad(vectors, missing) if np.any(missing) else vectors, codewords, 1)
    return codes[: len(vectors), 0], distances[: len(vectors), 0]


def _moved(
    vectors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.int64],
    distances: npt.NDArray[np.float32],
    codebook: npt.NDArray[np.float32],
    move: float,
) -> npt.NDArray[np.float32]:
    """Every codeword, moved so far towards its mean; what nothing chose goes to the vectors farthest from theirs."""
    count = len(codebook)
    members = np.bincount(codes, minlength=count)
    sums = np.stack([np.bincount(codes, column, count) for column in vectors.T], 1)
    means = sums / np.maximum(members, 1)[:, None]
    moved: npt.NDArray[np.float32] = (codebook + move * (means - codebook)).astype(np.float32)
    idle = np.flatnonzero(members == 0)
    if len(idle):
        moved[idle] = vectors[np.argpartition(distances, -len(idle))[-len(idle) :]]
    return moved


def _finite(array: npt.NDArray[Any]) -> bool:
    return bool(np.isfinite(array).all())


def _alone() -> None:
    """Keeps faiss to one thread, in the thread that calls this."""
    _faiss().omp_set_num_threads(1)


def check_installed() -> None:
    """Raises MissingDependency where there is no faiss. It is looked for, and not loaded."""
    if importlib.util.find_spec("faiss") is None:
        raise MissingDependency("faiss", "vq")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependency("faiss", "vq") from error
    return faiss
