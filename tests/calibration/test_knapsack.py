"""The exact choice: equal to brute force, and clear about what cannot be reached."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trimtab.calibration.knapsack import Item, solve
from trimtab.errors import InputError


def random_items(generator: np.random.Generator, nested: bool) -> list[Item]:
    """2 to 16 items; losses over ten orders of magnitude, as a trained network's are."""
    count = int(generator.integers(2, 17 if not nested else 13))
    names = [f"item{index}" for index in range(count)]
    apart: dict[str, set[str]] = {name: set() for name in names}
    for first, second in itertools.combinations(names, 2):
        if nested and generator.random() < 0.15:
            apart[first].add(second)
            apart[second].add(first)
    return [
        Item(
            name,
            float(10 ** generator.uniform(-10, 0)),
            int(generator.integers(1, 200_000)),
            frozenset(apart[name]),
        )
        for name in names
    ]


def brute_force(items: list[Item], target: int) -> float | None:
    """The least loss over all subsets, or None where none reaches the target."""
    count = len(items)
    masks = np.arange(1 << count)
    taken = (masks[:, None] >> np.arange(count)) & 1
    allowed = taken @ np.array([item.weight for item in items]) >= target
    for (i, first), (j, second) in itertools.combinations(enumerate(items), 2):
        if second.name in first.conflicts:
            allowed &= ~((taken[:, i] & taken[:, j]).astype(bool))
    losses = (taken @ np.array([item.loss for item in items]))[allowed]
    return float(losses.min()) if len(losses) else None


@pytest.mark.parametrize("nested", [False, True])
def test_equal_to_brute_force_on_a_hundred_cases(nested: bool) -> None:
    generator = np.random.default_rng(nested)
    reached = 0
    for _ in range(100):
        items = random_items(generator, nested)
        target = int(sum(item.weight for item in items) * generator.uniform(0.05, 0.95))
        expected = brute_force(items, target)
        if expected is None:
            with pytest.raises(InputError, match="at most"):
                solve(items, target)
            continue
        reached += 1
        by_name = {item.name: item for item in items}
        taken = [by_name[name] for name in solve(items, target)]
        assert sum(item.weight for item in taken) >= target
        assert not any(a.name in b.conflicts for a in taken for b in taken)
        assert sum(item.loss for item in taken) == pytest.approx(expected, rel=1e-9, abs=0.0)
    assert reached > 40


def test_says_the_most_that_can_go() -> None:
    items = [
        Item("block", 1.0, 10, frozenset({"a", "b"})),
        Item("a", 1.0, 4),
        Item("b", 1.0, 5),
        Item("c", 1.0, 3),
    ]
    with pytest.raises(InputError, match="14 are asked for, and at most 13 can go"):
        solve(items, 14)
    assert solve(items, 13) == ("block", "c")


def test_nothing_is_taken_for_nothing() -> None:
    assert solve([Item("a", 0.0, 5)], 0) == ()


def test_items_that_cost_nothing_are_taken_only_as_needed() -> None:
    assert len(solve([Item(name, 0.0, 5) for name in "abcd"], 10)) == 2
