"""Where the sampler keeps what it still needs: slots of the state, assigned by liveness.

This is register allocation by linear scan (Poletto and Sarkar, "Linear scan register allocation", TOPLAS
1999) on a straight line of evaluations. One rule differs from a CPU's: an engine writes its outputs while its
inputs may still be read, so a value that dies in an evaluation does not free its slot for what that
evaluation writes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BEFORE = -1
"""The evaluation that "writes" what is there before the first one."""


@dataclass(frozen=True)
class Lifetime:
    """A value, from the evaluation that writes it to the last one that reads it.

    Attributes:
        value: Any number that names the value.
        written: The evaluation that writes it, or `BEFORE`.
        last_read: The last evaluation that reads it; equal to ``written`` or smaller where none does.
    """

    value: int
    written: int
    last_read: int


def assign_slots(lifetimes: Sequence[Lifetime], fixed: Mapping[int, int]) -> tuple[dict[int, int], int]:
    """Give every value that is read later a slot.

    Two values share a slot only if the second is written by a later evaluation than the last that reads the
    first. The number of slots is the least possible under that rule: intervals on a line make an interval
    graph, where the greedy choice is optimal (values in ``fixed`` are all written before the first
    evaluation, so they take the lowest slots whatever the order).

    Args:
        lifetimes: In any order.
        fixed: Value -> slot, for values written `BEFORE` the first evaluation: 0, 1, ... without a gap.

    Returns:
        Value -> slot, without the values that nothing reads, and the number of slots.
    """
    slot_of: dict[int, int] = dict(fixed)
    count = len(fixed)
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (last read, slot)
    # A fixed value stays in its slot even if nothing reads it: the host writes it there.
    for life in sorted(lifetimes, key=lambda life: (life.written, life.value)):
        if life.value not in fixed and life.last_read <= life.written:
            continue
        while busy and busy[0][0] < life.written:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if life.value not in fixed:
            if free:
                slot_of[life.value] = heapq.heappop(free)
            else:
                slot_of[life.value], count = count, count + 1
        heapq.heappush(busy, (life.last_read, slot_of[life.value]))
    return slot_of, count
