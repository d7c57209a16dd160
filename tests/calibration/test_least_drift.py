"""The search for a schedule: against every schedule there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trimtab.calibration.least_drift import FULL, Drift, least_drift

OPTIONS, EVALUATIONS, AGES = 2, 7, 3


def drift(seed: int = 0) -> Drift:
    """Costs and errors by chance; some of what cannot be."""
    rng = np.random.default_rng(seed)
    macs = np.stack([rng.integers(90, 110, EVALUATIONS), *rng.integers(10, 60, (OPTIONS, EVALUATIONS))])
    errors = rng.random((OPTIONS, EVALUATIONS, AGES))
    errors[rng.random(errors.shape) < 0.1] = np.inf
    return Drift(macs, errors)


@pytest.mark.parametrize("seed", range(5))
def test_no_schedule_that_keeps_to_the_budget_has_less_drift(seed: int) -> None:
    given = drift(seed)
    budget, full = given.budget(1.6), {4}
    every = [
        choices
        for choices in itertools.product(range(1 + OPTIONS), repeat=EVALUATIONS)
        if choices[4] == FULL and given.cost(choices) <= budget
    ]
    best = min(given.summed(choices) for choices in every)
    found = least_drift(given, budget, full)
    assert found is not None and given.cost(found) <= budget and found[4] == FULL
    assert np.isfinite(best) and given.summed(found) == pytest.approx(best)


def test_a_budget_for_all_evaluations_in_full_gives_that() -> None:
    given = drift()
    assert least_drift(given, int(given.macs[FULL].sum())) == (FULL,) * EVALUATIONS


def test_a_speed_that_nothing_reaches_gives_nothing() -> None:
    given = drift()
    assert least_drift(given, given.budget(20)) is None
    assert least_drift(given, given.budget(1.5), range(EVALUATIONS)) is None


def test_a_schedule_that_reads_what_is_too_old_or_was_never_made_sums_to_infinity() -> None:
    given = Drift(np.ones((2, 5), np.int64), np.arange(1.0, 11.0).reshape(1, 5, 2))
    assert given.summed((0, 1, 1, 0, 1)) == 3 + 6 + 9
    assert given.summed((0, 1, 1, 1, 0)) == given.summed((1, 0, 0, 0, 0)) == np.inf
