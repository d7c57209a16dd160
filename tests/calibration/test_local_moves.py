"""Refining a schedule: what is measured decides, and how far it looks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trimtab.calibration.local_moves import refine

Choices = tuple[int, ...]

EVALUATIONS, FULLS = 8, 3


class Landscape:
    """A drift of every schedule, by chance but smooth: what far evaluations do adds up, neighbours interact."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.alone = rng.random((3, EVALUATIONS))
        self.pairs = 0.3 * rng.random((3, 3, EVALUATIONS - 1))
        self.measured: list[Choices] = []

    def drift(self, choices: Choices) -> float:
        alone = sum(self.alone[choice, index] for index, choice in enumerate(choices))
        return float(alone + sum(self.pairs[a, b, k] for k, (a, b) in enumerate(itertools.pairwise(choices))))

    def measure(self, choices: Choices) -> float:
        self.measured.append(choices)
        return self.drift(choices)


def allowed(choices: Choices) -> bool:
    return choices[0] == 0 and choices.count(0) == FULLS


def refined(land: Landscape, moves: int = 500) -> Choices:
    start = (0, 0, 0, 1, 1, 1, 1, 1)
    return refine(start, 2, land.measure, allowed, rank=lambda _: 0.0, moves=moves)


@pytest.mark.parametrize("seed", range(5))
def test_no_neighbour_of_what_is_found_drifts_less(seed: int) -> None:
    land = Landscape(seed)
    found = refined(land)
    every = [c for c in itertools.product(range(3), repeat=EVALUATIONS) if allowed(c)]

    def is_near(other: Choices) -> bool:
        apart = [(a, b) for a, b in zip(found, other, strict=True) if a != b]
        return len(apart) == 1 or (len(apart) == 2 and apart[0] == apart[1][::-1])

    near = [c for c in every if is_near(c)]
    assert near and land.drift(found) <= min(map(land.drift, near))
    assert land.drift(found) < land.drift((0, 0, 0, 1, 1, 1, 1, 1))
    assert all(map(allowed, land.measured)) and len(set(land.measured)) == len(land.measured)


def test_no_more_is_measured_than_was_allowed_and_what_seems_good_comes_first() -> None:
    land = Landscape(0)
    best = refined(land)
    assert refined(Landscape(0), moves=0) == (0, 0, 0, 1, 1, 1, 1, 1)
    few = Landscape(0)
    refined(few, moves=4)
    assert len(few.measured) == 5  # the start too
    led = Landscape(0)
    start = (0, 0, 0, 1, 1, 1, 1, 1)
    found = refine(start, 2, led.measure, allowed, rank=led.drift, moves=15)
    assert led.drift(found) <= land.drift(best) + 0.2
    assert led.drift(led.measured[1]) == min(map(led.drift, led.measured[1:2])) < led.drift(start)
