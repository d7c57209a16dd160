"""A better schedule by small moves: each is drawn to its end, and kept if its last latents drift less."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

Choices = tuple[int, ...]


def refine(
    start: Choices,
    options: int,
    measure: Callable[[Choices], float],
    allowed: Callable[[Choices], bool],
    rank: Callable[[Choices], float],
    moves: int,
) -> Choices:
    """Walks from schedule to neighbouring schedule while the measured drift falls.

    A neighbour has the choices of two evaluations exchanged (so a full one is moved), or one of them changed. The
    first that is better is taken. Deterministic.

    Args:
        start: For every evaluation 0, or 1 + the option that it skips.
        options: How many options there are.
        measure: The drift of a schedule.
        allowed: Whether a schedule may be taken at all.
        rank: What seems good is tried first: a guess at the drift.
        moves: How many neighbours are measured at most.

    Returns:
        A schedule that drifts less than the start, or the start.
    """
    best, least = start, measure(start)
    tried = {start}
    better = True
    while better:
        better = False
        fresh = {move for move in _neighbours(best, options) if move not in tried and allowed(move)}
        for choices in sorted(fresh, key=lambda move: (rank(move), move)):
            if not moves:
                return best
            moves -= 1
            tried.add(choices)
            drift = measure(choices)
            if drift < least:
                best, least, better = choices, drift, True
                logger.debug("a move to %s drifts %.5f", choices, drift)
                break
    return best


def _neighbours(choices: Choices, options: int) -> Iterator[Choices]:
    for first, second in itertools.combinations(range(len(choices)), 2):
        if choices[first] != choices[second]:
            swapped = list(choices)
            swapped[first], swapped[second] = choices[second], choices[first]
            yield tuple(swapped)
    for index in range(len(choices)):
        for choice in range(1 + options):
            yield (*choices[:index], choice, *choices[index + 1 :])
