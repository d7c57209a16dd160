"""A small network that reads pictures back into attributes, and the scores made from what it reads.

It reads five cells (the positions of `shapes.py`), in each of them the shape or none, its colour and its
size, and the background. It is trained on real pictures only (`train_judge.py`), so it cannot favour a
generator.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES, Scene, Thing
from torch import nn

WEIGHTS = Path(__file__).parent / "models" / "judge.safetensors"
FEATURES = 160
_COLOUR_NAMES, _BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)
_HEADS = {"shape": 1 + len(SHAPES), "colour": len(COLOURS), "size": len(SIZES)}  # shape 0: nothing there


class Judge(nn.Module):
    """Four strided convolutions, a layer of features, and a linear head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(fan_in, fan_out, 3, 2, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, FEATURES), nn.ReLU())
        self.cells = nn.ModuleDict({name: nn.Linear(FEATURES, 5 * size) for name, size in _HEADS.items()})
        self.background = nn.Linear(FEATURES, len(BACKGROUNDS))

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits.

        Args:
            pictures: (N, 3, 64, 64) float32 in 0..1.

        Returns:
            "shape" (N, 5, 6), "colour" (N, 5, 6), "size" (N, 5, 2), "background" (N, 4).
        """
        features = self.trunk(pictures - 0.5)
        logits = {name: head(features).unflatten(1, (5, -1)) for name, head in self.cells.items()}
        return {**logits, "background": self.background(features)}


@dataclass(frozen=True)
class Estimate:
    """A fraction with its standard error, and how many yes-or-no answers it is made of."""

    value: float
    error: float
    number: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% ± {100 * self.error:.1f}"


@dataclass(frozen=True)
class Score:
    """How much of what the captions state is in the pictures.

    Attributes:
        overall: Over all stated attributes.
        by_attribute: "shape", "colour", "size", "position", "background", and "count": exactly as many
            objects as named. The count is not a stated attribute, so it is not in `overall`.
    """

    overall: Estimate
    by_attribute: Mapping[str, Estimate]


def save(judge: Judge, path: Path = WEIGHTS) -> None:
    """Write the weights in FP16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}, path)


def load(path: Path = WEIGHTS) -> Judge:
    """Read the weights, ready to judge in float32."""
    judge = Judge()
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return judge.eval().requires_grad_(False)


def _batches(pictures: np.ndarray) -> Iterator[torch.Tensor]:
    for start in range(0, len(pictures), 256):
        part = np.ascontiguousarray(pictures[start : start + 256], np.float32)
        yield torch.from_numpy(part).permute(0, 3, 1, 2)


def read(judge: Judge, pictures: np.ndarray) -> list[Scene]:
    """What the judge sees.

    Args:
        judge: From `load`.
        pictures: (N, 64, 64, 3) float in 0..1.

    Returns:
        One complete scene per picture. It may hold up to five objects.
    """
    scenes = []
    for part in _batches(pictures):
        found = {name: logits.argmax(-1).numpy() for name, logits in judge(part).items()}
        for n in range(len(part)):
            things = tuple(
                Thing(
                    shape=SHAPES[found["shape"][n, cell] - 1],
                    colour=_COLOUR_NAMES[found["colour"][n, cell]],
                    size=SIZES[found["size"][n, cell]],
                    position=position,
                )
                for cell, position in enumerate(POSITIONS)
                if found["shape"][n, cell] > 0
            )
            scenes.append(Scene(things, _BACKGROUND_NAMES[found["background"][n]]))
    return scenes


def features(judge: Judge, pictures: np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) in 0..1 -> (N, 160) float64, the layer below the heads."""
    return np.concatenate([judge.trunk(part - 0.5).numpy() for part in _batches(pictures)]).astype(np.float64)


def compare(stated: Scene, seen: Scene) -> dict[str, list[bool]]:
    """Each stated attribute: is it in the picture?

    An object with a stated position is looked for there and nowhere else: if nothing is there, all of its
    attributes are wrong. Objects without one are matched with the cells left over in the way that suits them
    best.
    """
    there = {thing.position: thing for thing in seen.things}
    free = [p for p in POSITIONS if p not in {thing.position for thing in stated.things}]
    roaming = [thing for thing in stated.things if thing.position is None]

    def answers(thing: Thing, place: str) -> dict[str, bool]:
        found = there.get(place)
        wanted = {name: getattr(thing, name) for name in ("shape", "colour", "size")}
        right = {n: found is not None and getattr(found, n) == word for n, word in wanted.items() if word}
        return right if thing.position is None else {**right, "position": found is not None}

    def best() -> list[dict[str, bool]]:
        ways = itertools.permutations(free, len(roaming))
        options = ([answers(t, p) for t, p in zip(roaming, way, strict=True)] for way in ways)
        return max(options, key=lambda option: sum(sum(right.values()) for right in option))

    result: dict[str, list[bool]] = {}
    if stated.things:
        result["count"] = [len(seen.things) == len(stated.things)]
    for right in best() + [answers(t, t.position) for t in stated.things if t.position]:
        for name, yes in right.items():
            result.setdefault(name, []).append(yes)
    if stated.background:
        result["background"] = [seen.background == stated.background]
    return result


def _estimate(answers: Sequence[Sequence[bool]]) -> Estimate:
    """Pool the answers of all pictures. Those of one picture hang together: the error is that of a ratio."""
    right = np.array([sum(a) for a in answers], float)
    number = np.array([len(a) for a in answers], float)
    total = number.sum()
    if total == 0:
        return Estimate(float("nan"), float("nan"), 0)
    value = right.sum() / total
    return Estimate(float(value), float(np.sqrt(np.sum((right - value * number) ** 2)) / total), int(total))


def attributes(answer: dict[str, list[bool]]) -> list[bool]:
    """What `compare` answers of one picture, but for the count."""
    return [yes for name, part in answer.items() if name != "count" for yes in part]


def score(judge: Judge, pictures: np.ndarray, scenes: Sequence[Scene]) -> Score:
    """Score pictures against what their captions state.

    Args:
        judge: From `load`.
        pictures: (N, 64, 64, 3) float in 0..1.
        scenes: One per picture; what is None was not stated and does not count.
    """
    return estimate(answers(judge, pictures, scenes))


def answers(judge: Judge, pictures: np.ndarray, scenes: Sequence[Scene]) -> list[dict[str, list[bool]]]:
    """What `compare` says of each picture. The arguments are those of `score`."""
    return [compare(stated, seen) for stated, seen in zip(scenes, read(judge, pictures), strict=True)]


def estimate(found: Sequence[dict[str, list[bool]]]) -> Score:
    """The score of `answers`."""
    names = ("shape", "colour", "size", "position", "background", "count")
    return Score(
        _estimate([attributes(a) for a in found]),
        {name: _estimate([a.get(name, []) for a in found]) for name in names},
    )


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The Fréchet distance between two Gaussians fitted to features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6). The trace of the root is the
    sum of the root eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric, so no complex root is needed.

    Args:
        first: (N, D) float64.
        second: (M, D) float64.
    """
    values, vectors = np.linalg.eigh(np.cov(first, rowvar=False))
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    covariance = np.cov(second, rowvar=False)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance @ root), 0.0)).sum()
    shift = np.sum((first.mean(0) - second.mean(0)) ** 2)
    return float(shift + values.sum() + np.trace(covariance) - 2.0 * cross)
