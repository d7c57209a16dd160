"""What each removal costs: the output loss of LAPTOP-Diff (https://arxiv.org/abs/2404.11098).

    D_i = mean over (x_t, t, c) of ||eps_without_i(x_t, t, c) - eps(x_t, t, c)||^2 / elements

on the model's own trajectories. The sum of the single losses stands for the loss of removing several together.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trimtab.calibration.gates import Array, add_gates
from trimtab.calibration.journal import add, resume
from trimtab.calibration.trajectories import Sample
from trimtab.calibration.workers import Job, Workers
from trimtab.errors import CalibrationError
from trimtab.passes.candidates import Candidates
from trimtab.storage import GRAPHS
from trimtab.weights import WeightStore

logger = logging.getLogger(__name__)

SAMPLES = 16
"""Evaluations that a score is the mean of, unless the user says another number."""

_SCHEMA = 1

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

    def error(self, name: str) -> float:
        """The standard error of the mean over samples; infinite for a single one."""
        values = self.losses[name]
        return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


class GatedGraph:
    """A denoiser's gated graph on disk, and samples to evaluate it on.

    Args:
        model: The denoiser with its sampler; its large weights lie in ``folder / "graphs"`` or are written there.
        samples: See `trimtab.calibration.trajectories.record`.
        folder: Of a draft.
    """

    def __init__(self, model: ir.Model, samples: Sequence[Sample], folder: Path) -> None:
        self.candidates = Candidates(model)
        self.samples = [row_of(sample, model, number) for number, sample in enumerate(samples)]
        self.path = folder / GRAPHS / "denoiser.gated.onnx"
        gated = add_gates(model, self.candidates)
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
                # An upper bound: the engine was loaded, and the whole model evaluated beside the first job.
                seconds = (time.monotonic() - start) * len(jobs) / min(workers.processes, len(jobs))
                logger.info("%d evaluations of the denoiser: at most about %s", len(jobs), _clock(seconds))
            if progress is not None:
                progress(done, len(jobs))
            yield job, loss

    def score(self, workers: Workers, *, log: Path | None = None, progress: Progress | None = None) -> Scores:
        """The output loss of every candidate.

        Args:
            workers: Where to compute.
            log: A file that every loss is added to as it is found. What is in it already is not computed again.
            progress: Told how far it is.

        Raises:
            CalibrationError: The file is of another model or of other samples; a loss is not finite.
        """
        known: dict[Job, float] = {}
        if log is not None:
            known = dict(resume(log, self._header(), _parse, holds="losses", measured_on="samples"))
        jobs = [(i, (name,)) for i in range(len(self.samples)) for name in self.candidates]
        missing = [job for job in jobs if job not in known]
        for job, loss in self.losses(missing, workers, progress):
            known[job] = loss
            if log is not None:
                add(log, {"sample": job[0], "removed": job[1][0], "loss": loss.hex()})
        return Scores(
            self.candidates.fingerprint,
            {name: tuple(known[i, (name,)] for i in range(len(self.samples))) for name in self.candidates},
        )

    def joint(self, sets: Sequence[Sequence[str]], workers: Workers) -> list[float]:
        """The mean loss over the samples of removing each set together."""
        jobs = [(i, tuple(names)) for i in range(len(self.samples)) for names in sets]
        losses = dict(self.losses(jobs, workers))
        return [float(np.mean([losses[i, tuple(names)] for i in range(len(self.samples))])) for names in sets]

    def _header(self) -> dict[str, object]:
        samples = [_hash(sample) for sample in self.samples]
        return {"schema": _SCHEMA, "fingerprint": self.candidates.fingerprint, "samples": samples}


def row_of(sample: Sample, model: ir.Model, number: int) -> dict[str, Array]:
    """One guidance row of an evaluation, unguided: what the model itself is asked, at half the cost.

    Rows take turns, so that the model's answers with and without the condition count alike.

    Args:
        sample: Of one picture or several; rows lie one behind the other along the first axis.
        model: Says by the size "rows*batch" which inputs have rows.
        number: Of the sample.
    """
    batch, rows = sample.inputs["state"].shape[1], len(sample.inputs["mix"])
    chosen = number % rows
    inputs = {}
    for value in model.graph.inputs:
        array = sample.inputs[str(value.name)]
        first = value.shape[0] if value.shape is not None and value.shape.rank() else None
        if (
            len(array.shape)
            and array.shape[0] == rows * batch
            and str(getattr(first, "value", "")) == "rows*batch"
        ):
            array = array[chosen * batch : (chosen + 1) * batch]
        inputs[str(value.name)] = array.copy()
    inputs["mix"] = np.ones(1, np.float32)
    return inputs


def _parse(entry: Mapping[str, Any]) -> tuple[Job, float]:
    return (int(entry["sample"]), (str(entry["removed"]),)), float.fromhex(entry["loss"])


def _hash(sample: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(sample.items()):
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()[:16]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
