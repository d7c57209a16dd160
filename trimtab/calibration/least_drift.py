"""The schedule of skips with the least summed drift at a wanted speed, exactly."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FULL = 0
"""The choice of a full evaluation; choice k + 1 is to skip option k."""


@dataclass(frozen=True)
class Drift:
    """What skips cost and what they do, at every evaluation of one schedule.

    Attributes:
        macs: (1 + options, evaluations) int64: of a full evaluation, and of one that skips each option.
        errors: (options, evaluations, ages) float64: relative error (L2) of the next latents if an evaluation
            skips an option and reads what a full one made 1, 2, ... evaluations ago; inf where that cannot be.
            (The prediction's own error says less: a last step may miss it whole and hardly move the latents.)
    """

    macs: npt.NDArray[np.int64]
    errors: npt.NDArray[np.float64]

    def budget(self, speed: float) -> int:
        """The multiplications that a whole schedule may take, to be this many times as fast as full ones."""
        return int(self.macs[FULL].sum() / speed)

    def cost(self, choices: tuple[int, ...]) -> int:
        """The multiplications of a whole schedule."""
        return int(self.macs[list(choices), range(len(choices))].sum())

    def summed(self, choices: tuple[int, ...]) -> float:
        """The sum of a whole schedule's errors; inf where it reads what is too old."""
        total, age = 0.0, self.errors.shape[2]
        for index, choice in enumerate(choices):
            age = 0 if choice == FULL else age + 1
            if choice != FULL:
                total += self.errors[choice - 1, index, age - 1] if age <= self.errors.shape[2] else np.inf
        return float(total)


def least_drift(drift: Drift, budget: int, full: Collection[int] = ()) -> tuple[int, ...] | None:
    """For every evaluation `FULL`, or 1 + the option that it skips.

    Drift adds up in this model, and the age of what is read counts from the last full evaluation. (An evaluation
    that skips an inner option makes the outer one's feature anew; it is held to be as old as the inner one.) Exact
    for that model: dynamic programming over evaluations and ages, keeping of all ways to a state those of which
    none is both cheaper and has less drift than another.

    Args:
        drift: Measured.
        budget: Multiplications of all evaluations together, at most.
        full: Evaluations that must run in full; the first always does.

    Returns:
        None where no schedule keeps to the budget.
    """
    options, evaluations, ages = drift.errors.shape
    least = drift.macs.min(axis=0)
    for index in {0, *full}:
        least[index] = drift.macs[FULL, index]
    left = np.append(np.cumsum(least[::-1])[::-1], 0)  # left[t]: the least that t and all after it take
    # age -> (multiplications, drift, way) of each; a way is (last choice, way before it)
    states: dict[int, list[tuple[int, float, Any]]] = {ages: [(0, 0.0, None)]}
    for index in range(evaluations):
        following: dict[int, list[tuple[int, float, Any]]] = {}
        for age, entries in states.items():
            for macs, error, way in entries:
                following.setdefault(0, []).append((macs + int(drift.macs[FULL, index]), error, (FULL, way)))
                if age == ages or index in full:
                    continue
                for option in range(options):
                    added = float(drift.errors[option, index, age])
                    if np.isfinite(added):
                        following.setdefault(age + 1, []).append(
                            (macs + int(drift.macs[1 + option, index]), error + added, (1 + option, way))
                        )
        states = {
            age: _front([e for e in entries if e[0] + left[index + 1] <= budget])
            for age, entries in following.items()
        }
    ends = [entry for entries in states.values() for entry in entries]
    if not ends:
        return None
    way = min(ends, key=lambda entry: (entry[1], entry[0]))[2]
    choices: list[int] = []
    while way is not None:
        choices.append(way[0])
        way = way[1]
    return tuple(reversed(choices))


def _front(entries: list[tuple[int, float, Any]]) -> list[tuple[int, float, Any]]:
    kept: list[tuple[int, float, Any]] = []
    for entry in sorted(entries, key=lambda entry: entry[:2]):
        if not kept or entry[1] < kept[-1][1]:
            kept.append(entry)
    return kept
