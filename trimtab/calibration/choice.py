"""Which layers go: by measured losses, or as the rivals that those have to beat would have it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.calibration.knapsack import Item, solve
from trimtab.calibration.measures import Measure, parameters
from trimtab.errors import InputError, PassError, did_you_mean
from trimtab.passes.candidates import Candidate, Candidates
from trimtab.recipe import HANDCRAFTED
from trimtab.targets.device import Device


@dataclass(frozen=True)
class Wish:
    """What a user wants removed.

    Attributes:
        share: Of the whole, in 0..1.
        keep: Globs of modules that stay, with all inside of them.
        drop: Globs of modules that go in any case.
        of: What the share is of: one of `trimtab.recipe.MEASURES`.
        device: Whose time, where it is of time.
        precision: Of the engine there.
    """

    share: float
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    of: str = "parameters"
    device: Device | None = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"the share {self.share} of layers to remove is not between 0 and 1")


def by_loss(
    candidates: Candidates, wish: Wish, losses: Mapping[str, float], measure: Measure | None = None
) -> tuple[str, ...]:
    """Least summed loss for the share: see `trimtab.calibration.knapsack`.

    Args:
        candidates: Of the model.
        wish: How much.
        losses: Candidate -> the loss of removing it alone.
        measure: What the share is of; None for parameters.

    Raises:
        InputError: The share cannot be reached.
        PassError: A glob matches nothing.
    """
    return _with_wish(candidates, wish, solve, losses, measure)


def by_magnitude(candidates: Candidates, wish: Wish, measure: Measure | None = None) -> tuple[str, ...]:
    """Smallest weights first, by the mean of their magnitudes: what needs no data."""
    scores = {}
    for name in candidates:
        tensors = [v.const_value for v in candidates.weights(name) if v.const_value is not None]
        floats = [tensor.numpy() for tensor in tensors if tensor.dtype.is_floating_point()]
        total = sum(float(np.abs(array).sum(dtype=np.float64)) for array in floats)
        scores[name] = total / sum(array.size for array in floats)
    return _with_wish(candidates, wish, _in_order, scores, measure)


def by_chance(
    candidates: Candidates, wish: Wish, seed: int, measure: Measure | None = None
) -> tuple[str, ...]:
    """In random order until the share is reached: the control."""
    generator = np.random.default_rng(seed)
    scores = dict(zip(candidates, generator.random(len(candidates)).tolist(), strict=True))
    return _with_wish(candidates, wish, _in_order, scores, measure)


def by_hand(candidates: Mapping[str, Candidate], kind: str) -> tuple[str, ...]:
    """BK-SDM's choices for U-Nets with two blocks a level on the way down and three on the way up.

    base: the second ResNet block and attention of every level on the way down, and the second on the way up with
    its skip. small: the middle as well. tiny: the innermost level as well
    (https://arxiv.org/abs/2305.15798, section 3.1 and figure 3).

    Raises:
        PassError: The model is no such U-Net.
    """
    names = [n for n in candidates if _matches(n, ("down_blocks.*.resnets.1", "down_blocks.*.attentions.1"))]
    names += [n for n in candidates if _matches(n, ("up_blocks.*.resnets.1+*skip",))]
    if kind != "bk-sdm-base":
        names += [n for n in candidates if _matches(n, ("mid_block.resnets.?", "mid_block.attentions.?"))]
    if kind not in HANDCRAFTED or not names:
        raise PassError(f"{kind} is made for the U-Net of Stable Diffusion 1: choose by loss")
    if kind == "bk-sdm-tiny":
        deepest = max(map(_down_block, candidates))
        level = [n for n, c in candidates.items() if c.kind == "level" and _down_block(n) == deepest - 1]
        names += level
        if not level:
            raise PassError(
                f"{kind} removes the innermost level, and this U-Net's has other channels than the next"
            )
    covered = {inner for name in names for inner in candidates[name].inside}
    return tuple(name for name in names if name not in covered)


def _down_block(name: str) -> int:
    """The number of the block on the way down that a candidate lies in, or leads down from; -1 for none."""
    match = re.match(r"down_blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _in_order(items: Sequence[Item], target: int) -> tuple[str, ...]:
    """The items of least loss, until the target is reached."""
    taken: list[Item] = []
    weight = 0
    for item in sorted(items, key=lambda i: i.loss):
        names = {other.name for other in taken}
        if weight >= target:
            break
        if not item.conflicts & names:
            taken.append(item)
            weight += item.weight
    if weight < target:
        raise InputError(
            f"{target:,} are asked for, and one after another they free {weight:,}: ask for less, or choose by loss"
        )
    return tuple(item.name for item in taken)


def _with_wish(
    candidates: Candidates,
    wish: Wish,
    choose: Callable[[Sequence[Item], int], tuple[str, ...]],
    losses: Mapping[str, float],
    measure: Measure | None,
) -> tuple[str, ...]:
    measure = measure or parameters(candidates)
    kept, dropped = _matching(candidates, wish.keep), _matching(candidates, wish.drop)
    if both := sorted(set(kept) & set(dropped)):
        raise InputError(f"{both[0]} is to be kept and to be dropped: leave one of them out")
    gone = {inner for name in dropped for inner in candidates[name].inside}
    dropped = tuple(name for name in dropped if name not in gone)
    gone |= set(dropped)
    free = [
        c
        for c in candidates.values()
        if c.name not in kept and c.name not in gone and not set(c.inside) & (set(kept) | gone)
    ]
    target = round(wish.share * measure.total) - measure.freed(dropped)
    items = [
        Item(c.name, losses[c.name], measure.freed([c.name]), _conflicts(c.name, candidates)) for c in free
    ]
    try:
        return (*dropped, *choose(items, target))
    except InputError as error:
        most = "; the rest is no branch that can be bypassed" if choose is solve else ""
        limit = "; some were to be kept" if kept else most
        raise InputError(
            f"removing {wish.share:.0%} of {measure.total:,} {measure.unit} cannot be done: {error}{limit}"
        ) from None


def _conflicts(name: str, candidates: Candidates) -> frozenset[str]:
    """Those inside of a candidate, those around it, and those that share something inside."""
    own = set(candidates[name].inside)
    return frozenset(
        other.name
        for other in candidates.values()
        if other.name != name and (other.name in own or name in other.inside or own & set(other.inside))
    )


def _matching(candidates: Candidates, globs: Iterable[str]) -> tuple[str, ...]:
    """Candidates that a glob names, or that lie in a module that it names."""
    found: list[str] = []
    for glob in globs:
        names = [n for n in candidates if _matches(n, (glob, f"{glob}.*", f"{glob}+*"))]
        if not names:
            hint = did_you_mean(glob, candidates, "trimtab score lists what can be")
            raise PassError(f"nothing that can be removed matches {glob}: {hint}")
        found += names
    return tuple(dict.fromkeys(found))


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
