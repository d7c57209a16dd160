"""What a student is trained on: evaluations along the teacher's own trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from trimtab.calibration.sensitivity import has_rows, row_of
from trimtab.calibration.trajectories import Array, Sample, digest
from trimtab.errors import InputError
from trimtab.program import STATE


@dataclass(frozen=True)
class Batch:
    """Evaluations of one time step, as the graph has one for all rows; without guidance.

    Attributes:
        inputs: Graph input -> array.
        target: What the prediction should be, (batch, *latent) float32, where data say so.
    """

    inputs: Mapping[str, Array]
    target: Array | None = None


class Batches(Protocol):
    """Where batches come from.

    Attributes:
        identity: Of all that they are drawn from: training goes on only with the same.
    """

    @property
    def identity(self) -> str: ...

    def of(self, seed: int, step: int, size: int) -> Batch:
        """The batch of one optimizer step: a function of the seed and the step's number."""
        ...


class Trajectories:
    """Batches of recorded evaluations.

    Args:
        model: The denoiser with its sampler fused.
        samples: See `trimtab.calibration.trajectories.record`.

    Raises:
        InputError: There are none.
    """

    def __init__(self, model: ir.Model, samples: Sequence[Sample]) -> None:
        by_step: dict[int, list[dict[str, Array]]] = {}
        for sample in samples:
            for number in range(len(sample.inputs["mix"])):
                by_step.setdefault(sample.step, []).append(row_of(sample, model, number))
        self._rows = [by_step[step] for step in sorted(by_step)]
        if not self._rows:
            raise InputError("there is nothing to train on: record at least one evaluation")
        self._axes = batch_axes(model)
        self.identity = f"{len(samples)} evaluations {digest(row for rows in self._rows for row in rows)}"

    def of(self, seed: int, step: int, size: int) -> Batch:
        """See `Batches`."""
        generator = np.random.default_rng([seed, step])
        rows = self._rows[generator.integers(len(self._rows))]
        return Batch(stack([rows[i] for i in generator.integers(len(rows), size=size)], self._axes))


def batch_axes(model: ir.Model) -> dict[str, int]:
    """Graph input -> the axis of its batch, for those that have one."""
    return {STATE: 1} | {str(value.name): 0 for value in model.graph.inputs if has_rows(value)}


def stack(rows: Sequence[Mapping[str, Array]], axes: Mapping[str, int]) -> dict[str, Array]:
    """Evaluations of one picture each as one of several; what has no batch is the first one's."""
    return {
        name: np.concatenate([row[name] for row in rows], axes[name]) if name in axes else array
        for name, array in rows[0].items()
    }
