"""Least summed loss for a given weight: a 0-1 knapsack with conflicts, solved exactly.

Losses of a trained network span ten orders of magnitude, more than the absolute tolerances of a mixed-integer
solver can tell apart. So this is the list algorithm of Nemhauser and Ullmann (Discrete dynamic programming and
capital allocation, 1969): the front of all choices of which none is both cheaper and heavier than another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Item:
    """Something that can be taken.

    Attributes:
        name: Unique.
        loss: What taking it costs, not negative.
        weight: What it frees: parameters, bytes, or nanoseconds.
        conflicts: Items that cannot be taken beside it: those inside of it, and those that it lies in.
    """

    name: str
    loss: float
    weight: int
    conflicts: frozenset[str] = frozenset()


def solve(items: Sequence[Item], target: int) -> tuple[str, ...]:
    """Takes items of at least ``target`` weight with the least summed loss. Exact.

    Returns:
        Names, in the order of ``items``.

    Raises:
        InputError: The target cannot be reached; says the most that can.
    """
    if target <= 0:
        return ()
    by_name = {item.name: item for item in items}
    apart = {item.name: set(item.conflicts & by_name.keys()) for item in items}
    for name, others in list(apart.items()):
        for other in others:
            apart[other].add(name)
    search = _Search(by_name, apart, target)
    most = search.best(by_name.keys(), lambda item: -item.weight)
    reach = sum(by_name[name].weight for name in most)
    if reach < target:
        raise InputError(f"{target:,} are asked for, and at most {reach:,} can go")
    # Any choice that reaches the target bounds the loss of the best: the cheapest for their weight, in turn.
    front = search.front(frozenset(by_name), _greedy(items, apart, target, most))
    taken = set(front.trace(int(np.flatnonzero(front.weights >= target)[0])))
    # What costs nothing is on the front whether it is needed or not.
    spare = sum(by_name[name].weight for name in taken) - target
    for name in sorted(taken, key=lambda n: (-by_name[n].loss, by_name[n].weight)):
        if by_name[name].weight <= spare:
            spare -= by_name[name].weight
            taken.remove(name)
    return tuple(item.name for item in items if item.name in taken)


@dataclass(frozen=True)
class _Front:
    """Choices of which none is both cheaper and heavier than another, by rising loss and weight.

    Attributes:
        weights: (n,) int64, at most the target.
        losses: (n,) float64.
        trace: Index -> the names that were taken.
    """

    weights: Array
    losses: Array
    trace: Callable[[int], tuple[str, ...]]


_NOTHING = _Front(np.zeros(1, np.int64), np.zeros(1), lambda index: ())


class _Search:
    def __init__(self, items: dict[str, Item], apart: dict[str, set[str]], target: int) -> None:
        self._items = items
        self._apart = apart
        self._target = target

    def front(self, names: frozenset[str], bound: float) -> _Front:
        """The front over some items, up to a loss."""
        whole = _NOTHING
        # Those that conflict with nothing come last: the front is short while the parts are long.
        for part in sorted(self._parts(names), key=len, reverse=True):
            whole = self._sum(whole, self._part(part, bound), bound)
        return whole

    def _part(self, names: frozenset[str], bound: float) -> _Front:
        """Of items that hang together by conflicts: with the one that has most of them, or without it."""
        if not names:
            return _NOTHING
        name = max(sorted(names), key=lambda n: len(self._apart[n] & names))
        item = self._items[name]
        without = self.front(names - {name}, bound)
        rest = self.front(names - {name} - self._apart[name], bound)
        split = len(without.weights)
        weights = np.concatenate([without.weights, rest.weights + item.weight])
        losses = np.concatenate([without.losses, rest.losses + item.loss])
        kept = self._best(weights, losses, bound)

        def trace(index: int) -> tuple[str, ...]:
            at = int(kept[index])
            return without.trace(at) if at < split else (name, *rest.trace(at - split))

        return _Front(np.minimum(weights[kept], self._target), losses[kept], trace)

    def _sum(self, first: _Front, second: _Front, bound: float) -> _Front:
        """One choice of each."""
        if first is _NOTHING:
            return second
        weights = np.add.outer(first.weights, second.weights).reshape(-1)
        losses = np.add.outer(first.losses, second.losses).reshape(-1)
        kept = self._best(weights, losses, bound)
        columns = len(second.weights)

        def trace(index: int) -> tuple[str, ...]:
            row, column = divmod(int(kept[index]), columns)
            return (*first.trace(row), *second.trace(column))

        return _Front(np.minimum(weights[kept], self._target), losses[kept], trace)

    def _best(self, weights: Array, losses: Array, bound: float) -> Array:
        """Indices of the front."""
        weights = np.minimum(weights, self._target)
        # The bound is a sum in another order than the front's.
        chosen = np.flatnonzero(losses <= bound * (1 + 1e-9))
        order = chosen[np.lexsort((-weights[chosen], losses[chosen]))]
        sorted_weights = weights[order]
        before = np.maximum.accumulate(np.concatenate([[-1], sorted_weights[:-1]]))
        return order[sorted_weights > before]

    def _parts(self, names: frozenset[str]) -> list[frozenset[str]]:
        """Items that hang together by conflicts."""
        left, parts = set(names), []
        while left:
            part, todo = set(), [min(left)]
            while todo:
                name = todo.pop()
                if name not in part:
                    part.add(name)
                    todo += self._apart[name] & names
            parts.append(frozenset(part))
            left -= part
        return parts

    def best(self, names: Any, cost: Callable[[Item], float]) -> tuple[str, ...]:
        """The choice of least cost, whatever its weight."""
        chosen: tuple[str, ...] = ()
        for part in self._parts(frozenset(names)):
            chosen += self._best_part(part, cost)
        return chosen

    def _best_part(self, names: frozenset[str], cost: Callable[[Item], float]) -> tuple[str, ...]:
        if not names:
            return ()
        name = max(sorted(names), key=lambda n: len(self._apart[n] & names))
        without = self.best(names - {name}, cost)
        taken = (name, *self.best(names - {name} - self._apart[name], cost))
        return min(without, taken, key=lambda choice: sum(cost(self._items[n]) for n in choice))


def _greedy(items: Sequence[Item], apart: dict[str, set[str]], target: int, most: tuple[str, ...]) -> float:
    """The loss of some choice that reaches the target."""
    by_name = {item.name: item for item in items}
    bounds = [sum(by_name[name].loss for name in most)]
    for pool in (items, [by_name[name] for name in most]):
        taken: set[str] = set()
        weight = 0
        for item in sorted(pool, key=lambda i: i.loss / max(i.weight, 1)):
            if weight < target and not apart[item.name] & taken:
                taken.add(item.name)
                weight += item.weight
        if weight >= target:
            bounds.append(sum(by_name[name].loss for name in taken))
    return float(min(bounds))
