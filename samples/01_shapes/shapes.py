"""What a picture of this sample holds, and the words for it: scenes, captions, and a seeded source of both.

A scene is data; `draw.py` turns it into pixels. A caption says all of a scene or only a part of it, so every
attribute but the shape may be None, which means that it is not said:

    a large red circle at the top left and a small blue star at the bottom right on a white background
    a red circle on a black background
    a star
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
POSITIONS = ("top left", "top right", "bottom left", "bottom right", "center")
# No colour and no shape starts with a vowel, so the article is always "a". Every colour stands out from every
# background by at least 70 of 255 in some channel.
COLOURS = {
    "red": (214, 40, 40),
    "green": (70, 205, 60),
    "blue": (38, 96, 230),
    "yellow": (250, 205, 30),
    "purple": (140, 50, 180),
    "cyan": (60, 205, 225),
}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "brown": (110, 70, 40),
}


@dataclass(frozen=True)
class Thing:
    """One object of a scene. None: not said."""

    shape: str
    colour: str | None = None
    size: str | None = None
    position: str | None = None

    def __str__(self) -> str:
        words = ["a", *(word for word in (self.size, self.colour) if word), self.shape]
        if self.position:
            words.append(f"at the {self.position}")
        return " ".join(words)


@dataclass(frozen=True)
class Scene:
    """Up to three objects on a background. No objects and no background: the empty caption."""

    things: tuple[Thing, ...] = ()
    background: str | None = None

    @property
    def caption(self) -> str:
        """The scene in words; `Scene.parse` is its inverse."""
        words = " and ".join(str(thing) for thing in self.things)
        return f"{words} on a {self.background} background" if self.background else words

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """Read a caption of this grammar.

        Raises:
            ValueError: the caption is not one that `Scene.caption` writes.
        """
        if not caption:
            return cls()
        body = _CAPTION.fullmatch(caption)
        if body is None:
            raise ValueError(f"not a caption of this grammar: {caption!r}")
        things = [_THING.fullmatch(words) for words in body["things"].split(" and ")]
        return cls(tuple(Thing(**found.groupdict()) for found in things if found), body["background"])


def _one_of(name: str, words: Iterable[str]) -> str:
    return f"(?P<{name}>{'|'.join(words)})"


_THING = re.compile(
    f"a (?:{_one_of('size', SIZES)} )?(?:{_one_of('colour', COLOURS)} )?{_one_of('shape', SHAPES)}"
    f"(?: at the {_one_of('position', POSITIONS)})?"
)
_BARE_THING = re.sub(r"\?P<\w+>", "?:", _THING.pattern)
_CAPTION = re.compile(
    f"(?P<things>{_BARE_THING}(?: and {_BARE_THING}){{0,2}})"
    f"(?: on a {_one_of('background', BACKGROUNDS)} background)?"
)


def sample_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """Draw a complete scene: nothing in it is None.

    Args:
        rng: The source of randomness.
        count: Number of objects, 1 to 3; None draws it (45%, 40%, 15%).

    Returns:
        A scene whose objects are in reading order. An object in the center is alone: it would touch others.
    """
    if count is None:
        count = int(rng.choice(3, p=(0.45, 0.4, 0.15))) + 1
    places = [int(rng.integers(5))] if count == 1 else sorted(rng.choice(4, size=count, replace=False))
    things = tuple(
        Thing(
            shape=SHAPES[rng.integers(len(SHAPES))],
            colour=tuple(COLOURS)[rng.integers(len(COLOURS))],
            size=SIZES[rng.integers(2)],
            position=POSITIONS[place],
        )
        for place in places
    )
    return Scene(things, tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))])


def sample_scenes(seed: int, number: int, count: int | None = None) -> list[Scene]:
    """`number` complete scenes, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, count) for _ in range(number)]


def forget(scene: Scene, rng: np.random.Generator, whole: float = 0.6, empty: float = 0.1) -> Scene:
    """Leave attributes of a scene unsaid, as people do.

    No object is left out altogether: a short prompt should not learn to bring uninvited objects along.

    Args:
        scene: A complete scene.
        rng: The source of randomness.
        whole: Chance that all is said.
        empty: Chance that nothing is said, for classifier-free guidance.
    """
    chance = rng.random()
    if chance < empty:
        return Scene()
    if chance < empty + whole:
        return scene
    # What is left unsaid is decided for the whole scene, not per object: "a red circle and a blue star".
    unsaid = {name: None for name in ("colour", "size", "position") if rng.random() < 0.5}
    things = tuple(replace(thing, **unsaid) for thing in scene.things)
    return Scene(things, scene.background if rng.random() < 0.5 else None)


def batches(seed: int, size: int) -> Iterator[list[Scene]]:
    """Endless batches of complete scenes."""
    rng = np.random.default_rng(seed)
    while True:
        yield [sample_scene(rng) for _ in range(size)]
