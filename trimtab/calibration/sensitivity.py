"""What each removal costs: the output loss of LAPTOP-Diff (https://arxiv.org/abs/2404.11098).

    D_i = mean over (x_t, t, c) of ||eps_without_i(x_t, t, c) - eps(x_t, t, c)||^2 / elements

on the model's own trajectories. The sum of the single losses stands for the loss of removing several together.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trimtab.calibration.gates import GATES, Array, add_gates
from trimtab.calibration.journal import add, header, peek, resume
from trimtab.calibration.trajectories import Sample, digest
from trimtab.calibration.workers import CHUNK, Job, Workers
from trimtab.errors import CalibrationError
from trimtab.passes.candidates import Candidates
from trimtab.passes.sampler import ROWS_BATCH
from trimtab.passes.split_attention import SplitAttention
from trimtab.program import STATE
from trimtab.storage import GRAPHS
from trimtab.targets.key import weights_digest
from trimtab.weights import WeightStore

logger = logging.getLogger(__name__)

SAMPLES = 16
"""Evaluations that a score is the mean of, unless the user says another number."""

_SCHEMA = 1

_SAMPLES_OF = "samples (those of another --steps, --scheduler, --size, --samples or --prompt)"

Progress = Callable[[int, int], None]
"""Told (evaluations done, evaluations in all)."""


@dataclass(frozen=True)
class Scores:
    """Output losses of single removals.

    Attributes:
        fingerprint: `Candidates.fingerprint` of the model.
        losses: Candidate -> its loss on each sample.
    """

    fingerprint: str
    losses: Mapping[str, tuple[float, ...]]

    def mean(self, name: str) -> float:
        """The score D_i."""
        return float(np.mean(self.losses[name]))

    def error(self, name: str) -> float | None:
        """The standard error of the mean over samples; None for a single one, which says nothing of it."""
        values = self.losses[name]
        return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


class GatedGraph:
    """A denoiser's gated graph on disk, and samples to evaluate it on.

    Args:
        model: The denoiser with its sampler; its large weights lie in ``folder / "graphs"`` or are written there.
        samples: See `trimtab.calibration.trajectories.record`.
        folder: Of a draft.
        mark: The model's `mark_of`, where it is known already.
        asked: What the samples were asked for by, which a file of losses then says, for `asked_for`.
    """

    def __init__(
        self,
        model: ir.Model,
        samples: Sequence[Sample],
        folder: Path,
        mark: str | None = None,
        asked: Mapping[str, object] | None = None,
    ) -> None:
        self.candidates = Candidates(model)
        self._mark = mark
        self._asked = {"asked": dict(asked)} if asked else {}
        self.samples = [row_of(sample, model, number) for number, sample in enumerate(samples)]
        self.path = folder / GRAPHS / "denoiser.gated.onnx"
        gated = add_gates(model, self.candidates)
        sizes = {name: array.shape for name, array in self.samples[0].items()}
        SplitAttention({**sizes, GATES: (len(self.candidates),)})(gated)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        WeightStore(self.path.parent).keep("denoiser.gated", gated)
        ir.save(gated, self.path)

    def remove(self) -> None:
        """Takes the gated graph's own files away."""
        for path in (self.path, self.path.with_suffix(".weights")):
            path.unlink(missing_ok=True)

    def losses(
        self, jobs: Sequence[Job], workers: Workers, progress: Progress | None = None
    ) -> Iterator[tuple[Job, float]]:
        """Losses of jobs as they are done; says in the log how long all of them will take.

        Raises:
            CalibrationError: A loss is not finite.
        """
        start = time.monotonic()
        found = workers.losses(self.path, list(self.candidates), self.samples, jobs)
        for done, (job, loss) in enumerate(found, 1):
            if not math.isfinite(loss):
                raise CalibrationError(
                    f"the loss without {' and '.join(job[1])} is not finite at sample {job[0]}: keep them out of "
                    "what may go, or mend the model's weights"
                )
            if done == 1:
                # An upper bound: the engine was loaded beside the first chunk.
                chunk = min(CHUNK, sum(other[0] == job[0] for other in jobs))
                seconds = (time.monotonic() - start) * max(1.0, len(jobs) / chunk / workers.processes)
                logger.info("%d evaluations of the denoiser: at most about %s", len(jobs), clock(seconds))
            if progress is not None:
                progress(done, len(jobs))
            yield job, loss

    def score(
        self,
        workers: Workers,
        *,
        log: Path | None = None,
        progress: Progress | None = None,
        names: Iterable[str] | None = None,
    ) -> Scores:
        """The output losses of candidates.

        Args:
            workers: Where to compute.
            log: A file that every loss is added to as it is found. What is in it already is not computed again.
            progress: Told how far it is.
            names: Of the candidates; None for all.

        Raises:
            CalibrationError: The file is of another model or of other samples; a loss is not finite.
        """
        names = tuple(self.candidates if names is None else names)
        losses = self._measured([(name,) for name in names], workers, log, progress)
        return Scores(self.candidates.fingerprint, dict(zip(names, losses, strict=True)))

    def joint(
        self, sets: Sequence[Sequence[str]], workers: Workers, *, log: Path | None = None
    ) -> list[float]:
        """The mean loss over the samples of removing each set together; ``log`` as in `score`."""
        losses = self._measured([tuple(sorted(names)) for names in sets], workers, log, None)
        return [float(np.mean(values)) for values in losses]

    def _measured(
        self, sets: Sequence[tuple[str, ...]], workers: Workers, log: Path | None, progress: Progress | None
    ) -> list[tuple[float, ...]]:
        """Losses of each set on every sample."""
        known: dict[Job, float] = {}
        if log is not None:
            known = dict(resume(log, self._header(), _parse, holds="losses", measured_on=_SAMPLES_OF))
        numbers = range(len(self.samples))
        jobs = dict.fromkeys((i, names) for i in numbers for names in sets)
        missing = [job for job in jobs if job not in known]
        for job, loss in self.losses(missing, workers, progress):
            known[job] = loss
            if log is not None:
                number, names = job
                removed = names[0] if len(names) == 1 else names
                add(log, {"sample": number, "removed": removed, "loss": loss.hex()})
        return [tuple(known[i, names] for i in numbers) for names in sets]

    def _header(self) -> dict[str, object]:
        samples = [digest([sample]) for sample in self.samples]
        if self._mark is None:
            self._mark = mark_of(self.candidates)
        return {"schema": _SCHEMA, "fingerprint": self._mark, "samples": samples, **self._asked}


def mark_of(candidates: Candidates) -> str:
    """A hash of a denoiser that losses are of: its architecture and the values of its weights.

    `Candidates.fingerprint` leaves the values out, for a plan may be carried out on a model that was trained further.
    The sampler's own constants are scalars or whole numbers, and are left out.
    """
    values = (v for v in candidates.all_weights if v.dtype is not None and v.dtype.is_floating_point())
    weights = weights_digest(v for v in values if v.const_value is not None and v.const_value.size > 1)
    return hashlib.sha256(f"{candidates.fingerprint} {weights}".encode()).hexdigest()


def has_rows(value: ir.Value) -> bool:
    """Whether the first axis of a denoiser's input is that of the guidance rows of all pictures."""
    first = value.shape[0] if value.shape is not None and value.shape.rank() else None
    return isinstance(first, ir.SymbolicDim) and first.value == ROWS_BATCH


def row_of(sample: Sample, model: ir.Model, number: int) -> dict[str, Array]:
    """One guidance row of an evaluation, unguided: what the model itself is asked, at half the cost.

    Rows take turns, so that the model's answers with and without the condition count alike.

    Args:
        sample: Of one picture or several; rows lie one behind the other along the first axis.
        model: Says by `has_rows` which inputs have rows.
        number: Of the sample.
    """
    batch, rows = sample.inputs[STATE].shape[1], len(sample.inputs["mix"])
    chosen = number % rows
    inputs = {}
    for value in model.graph.inputs:
        array = sample.inputs[str(value.name)]
        if has_rows(value):
            array = array[chosen * batch : (chosen + 1) * batch]
        inputs[str(value.name)] = array.copy()
    inputs["mix"] = np.ones(1, np.float32)
    return inputs


def kept_losses(log: Path, mark: str) -> int:
    """How many losses of single layers a file holds, whatever the samples: found out before anything is measured.

    Args:
        log: The file.
        mark: `mark_of` the model.

    Raises:
        CalibrationError: The file is of another model, or of something else.
    """
    return sum(len(names) == 1 for (_, names), _ in peek(log, mark, _parse, holds="losses"))


def asked_for(log: Path) -> dict[str, Any]:
    """What the samples of a file of losses were asked for by: ``samples``, ``prompts``, where no defaults.

    Raises:
        CalibrationError: It is no such file.
    """
    asked: Any = header(log, _parse, holds="losses").get("asked", {})
    known = isinstance(asked, dict) and isinstance(asked.get("samples", 0), int)
    if not known or not isinstance(asked.get("prompts", []), list):
        raise CalibrationError(
            f"{log} does not say what its losses were measured on: name another file, or remove it"
        )
    found = {name: asked[name] for name in ("samples", "prompts") if name in asked}
    return found | ({"prompts": tuple(map(str, found["prompts"]))} if "prompts" in found else {})


def _parse(entry: Mapping[str, Any]) -> tuple[Job, float]:
    removed = entry["removed"]  # a name, or several that went together
    names = (removed,) if isinstance(removed, str) else tuple(map(str, removed))
    loss = float.fromhex(entry["loss"])
    if not math.isfinite(loss):
        raise ValueError("a loss that is not finite")
    return (int(entry["sample"]), names), loss


def clock(seconds: float) -> str:
    """Such as "3 h 20 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
