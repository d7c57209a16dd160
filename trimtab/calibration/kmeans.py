"""Codebooks by k-means: every weight on its own, by nothing but its values."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.calibration.codebooks import FORMATS, Codebooks, CodebookStore, PackedWeight, fingerprint
from trimtab.errors import CalibrationError, InputError, MissingDependency
from trimtab.passes import vq_op
from trimtab.passes.vq import Site, sites
from trimtab.weights import same_tensor

logger = logging.getLogger(__name__)

KEEP = "keep"

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

PER_CODEWORD = 8
"""Sub-vectors for each codeword, at least: smaller weights get fewer codewords. Then a codebook of 32-bit numbers is
at most twice as large as its codes, and a small weight still shrinks to 6 bits."""

FEWEST = 16
"""Codewords, at least. A weight with fewer than 16 * 8 sub-vectors stays as it is: packing saves it under 2 KB."""

_LEAST_VECTORS, _LEAST_LENGTH = 32768, 4
"""From these sizes on, faiss 1.15 has a search that takes a twelfth of the time: less is filled up with zeros."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What decides the codebooks.

    Attributes:
        bits: For a weight: 2, 3 or 4.
        rules: Pattern of module paths (``*`` and ``?``) -> its own bits, or ``"keep"``; the first that fits decides.
        scale: Whether every output channel has a factor of its own.
        seed: Of the samples and the first codewords.
    """

    bits: int = 2
    rules: tuple[tuple[str, int | str], ...] = ()
    scale: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for bits in (self.bits, *(bits for _, bits in self.rules if bits != KEEP)):
            if bits not in FORMATS:
                raise InputError(f"{bits!r} bits were asked for, and weights are packed to 2, 3 or 4 bits")


def choose(found: Iterable[Site], settings: Settings) -> dict[str, tuple[int, int] | str]:
    """Decides for every weight: (bits, codewords), or why it stays as it is.

    What no rule names is packed if its layer lies in a block that the model repeats (its path has a number in it),
    as in VQ4DiT, and is no embedder in there. So the first and the last layers stay, and embeddings do.

    Args:
        found: Of the denoiser.
        settings: The user's.

    Raises:
        InputError: A rule that fits no layer.
    """
    every = list(found)
    _check_rules(every, settings)
    return {site.name: _choice(site, settings) for site in every}


def _check_rules(found: Iterable[Site], settings: Settings) -> None:
    idle = {pattern for pattern, _ in settings.rules} - {
        own[0] for site in found if (own := _rule(site, settings)) is not None
    }
    if idle:
        raise InputError(f"the rule {min(idle)!r} fits no layer: see the layers with trimtab inspect")


def _rule(site: Site, settings: Settings) -> tuple[str, int | str] | None:
    """The first rule that fits a weight's layer."""
    return next((rule for rule in settings.rules if fnmatch.fnmatchcase(site.module, rule[0])), None)


def _choice(site: Site, settings: Settings) -> tuple[int, int] | str:
    """(bits, codewords) of one weight, or why it stays as it is."""
    own = _rule(site, settings)
    bits = settings.bits
    if own is None:
        if (reason := _outside(site.module)) is not None:
            return reason
    elif own[1] == KEEP:
        return "a rule keeps it"
    else:
        bits = int(own[1])
    shape = FORMATS[bits]
    rows, columns = site.shape[0], int(np.prod(site.shape[1:]))
    codewords = _codewords(rows * -(-columns // shape.length), shape.codewords)
    return (bits, codewords) if codewords else f"it is too small: {rows} x {columns}"


def _outside(module: str) -> str | None:
    """Why a layer is not one of a repeated block's own; None if it is."""
    parts = module.split(".")
    if not any(part.isdecimal() for part in parts):
        return "it lies outside of the repeated blocks"
    if any(
        part == "emb" or part.endswith(("embed", "embedder", "embedding", "embeddings")) for part in parts
    ):
        return "it is an embedder"
    return None


def _codewords(vectors: int, most: int) -> int:
    """The codewords for so many sub-vectors, a power of two; 0 where they are too few."""
    fitting = min(most, vectors // PER_CODEWORD)
    return 0 if fitting < FEWEST else 1 << (fitting.bit_length() - 1)


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
    found = _distinct(models)
    _check_rules(found.values(), settings)  # before anything is read
    choices = {name: _choice(site, settings) for name, site in found.items()}
    picked = {name: choice for name, choice in choices.items() if not isinstance(choice, str)}
    for name in picked:
        if not _finite(found[name].rows()):
            raise CalibrationError(f"{name} holds numbers that are not finite: mend the model's weights")
    mark = fingerprint((name, site.rows()) for name, site in found.items())  # whichever the settings pick
    kept = {name: choice for name, choice in choices.items() if isinstance(choice, str)}
    noted = {"bits": settings.bits, "rules": settings.rules, "scale": settings.scale, "seed": settings.seed}
    files = None if store is None else CodebookStore(store, mark, noted)

    def one(name: str) -> PackedWeight:
        if files is not None and name in files:
            return files.get(name)
        bits, codewords = picked[name]
        packed = pack(found[name].rows(), bits, codewords, scaled=settings.scale, seed=settings.seed)
        if files is not None:
            files.put(name, packed)
        progress(f"k-means of {name}")
        return packed

    # A weight a thread: threads that share one wait for each other at every step, and most weights are small.
    pool = ThreadPoolExecutor(threads or os.cpu_count(), initializer=_alone)
    try:
        layers = dict(zip(picked, pool.map(one, picked), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    return Codebooks(mark, layers, kept)


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
    rows: npt.NDArray[Any], bits: int, codewords: int, *, scaled: bool = False, seed: int = 0
) -> PackedWeight:
    """Packs one weight.

    Args:
        rows: (O, n), the input channels innermost, finite.
        bits: A key of `FORMATS`.
        codewords: Of the codebook; no more than there are sub-vectors.
        scaled: Divides every row by its root mean square first.
        seed: Of the sample and the first codewords.

    Raises:
        CalibrationError: Fewer sub-vectors than codewords.
        MissingDependency: faiss is not installed.
    """
    shape = FORMATS[bits]
    rows = np.asarray(rows, np.float32)
    scale = None
    if scaled:
        scale = np.sqrt(np.square(rows, dtype=np.float64).mean(1)).astype(np.float32)
        scale[scale == 0] = 1.0
    vectors = vq_op.cut(rows if scale is None else rows / scale[:, None], shape.length)
    flat = np.ascontiguousarray(vectors.reshape(-1, shape.length))
    codebook = rounded(cluster(flat, codewords, seed=seed))
    codes = vq_op.pack_indices(
        nearest(flat, codebook).astype(np.uint8).reshape(vectors.shape[:2]), shape.index_bits
    )
    packed = PackedWeight(bits, codes, codebook, scale, rows.shape[1], error=0.0)
    return with_error(packed, rows)


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
    """Nearest codeword and squared distance of each vector, exactly."""
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


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependency("faiss", "vq") from error
    return faiss
