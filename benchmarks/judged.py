"""Pictures of the shipped shapes model, drawn through a pipeline in batches and read back by its judge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.runtime.load import Pipeline

SAMPLE = Path(__file__).parents[1] / "samples" / "01_shapes"
MODEL = SAMPLE / "models" / "shapes-sd"
GUIDANCE = 5.0
"""What the model's own evaluation uses."""

sys.path.insert(0, str(SAMPLE))


def scenes(number: int) -> list[Any]:
    """Scenes with one, two and three objects in equal parts, from seeds that no training saw."""
    from shapes import sample_scenes

    third = -(-number // 3)
    kinds = [sample_scenes(9100 + count, third, count) for count in (1, 2, 3)]
    return [scene for trio in zip(*kinds, strict=True) for scene in trio][:number]


def captions() -> list[str]:
    """To train on: of scenes that nobody judges."""
    from shapes import sample_scenes

    texts = [scene.caption for count in (1, 2, 3) for scene in sample_scenes(7100 + count, 32, count)]
    return list(np.random.default_rng(0).permutation(texts))


def draw_scenes(folder: Path, number: int) -> Path:
    """To train on: pictures of as many scenes with their captions, in a folder as a user's own would be."""
    from draw import draw as draw_exactly
    from PIL import Image
    from shapes import sample_scenes

    folder.mkdir(exist_ok=True)
    third = -(-number // 3)
    drawn = [scene for count in (1, 2, 3) for scene in sample_scenes(7200 + count, third, count)][:number]
    pixels = np.round(255 * draw_exactly(drawn, seed=0)).astype(np.uint8)
    for index, (scene, picture) in enumerate(zip(drawn, pixels, strict=True)):
        Image.fromarray(picture).save(folder / f"{index:05}.png")
        (folder / f"{index:05}.txt").write_text(scene.caption)
    return folder


def draw(pipeline: Pipeline, stated: list[Any], schedule: str | None = None, batch: int = 50) -> np.ndarray:
    """(N, 64, 64, 3) float32 in 0..1; picture k has the seed k, whatever the batch."""
    parts = []
    for start in range(0, len(stated), batch):
        part = stated[start : start + batch]
        result = pipeline(
            [scene.caption for scene in part],
            guidance=GUIDANCE,
            seed=list(range(start, start + len(part))),
            schedule=schedule,
        )
        parts.append(result.pixels)
    return np.concatenate(parts)


def answers(pictures: np.ndarray, stated: list[Any]) -> list[dict[str, list[bool]]]:
    """What the judge finds of each picture's stated attributes."""
    import judge

    return judge.answers(judge.load(), pictures, stated)


def score(pictures: np.ndarray, stated: list[Any]) -> dict[str, float]:
    """`summary` of `answers`."""
    return summary(answers(pictures, stated))


def summary(found: list[dict[str, list[bool]]]) -> dict[str, float]:
    """The share of stated attributes that the judge finds, with its standard error, and the exact counts' share."""
    import judge

    estimated = judge.estimate(found)
    count = estimated.by_attribute["count"]
    return {
        "pictures": len(found),
        "overall": estimated.overall.value,
        "error": estimated.overall.error,
        "count": count.value,
        "count_error": count.error,
    }


def counts(found: list[dict[str, list[bool]]]) -> np.ndarray:
    """(N, 2): how many of each picture's stated attributes are found, and how many there are; of `answers`."""
    import judge

    pooled = [judge.attributes(answer) for answer in found]
    return np.array([[sum(part), len(part)] for part in pooled], float)


def ahead(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """By how much the second's share of found attributes is ahead, of `counts` of the same scenes from the same noise,
    and its standard error over pictures: what is hard in a picture is so for both."""
    total = one[:, 1].sum()
    by_picture = other[:, 0] - one[:, 0]
    difference = by_picture.sum() / total
    return difference, np.sqrt(np.square(by_picture - difference * one[:, 1]).sum()) / total
