"""What the host makes of a request: one array for every input that a task declares.

An input's ``source["kind"]`` names a function here. None of them knows a model: what differs between models
is in the options beside the kind.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import BundleError, InputError
from trimtab.program import TEXT, TensorSpec
from trimtab.runtime.noise import NoiseGenerator
from trimtab.runtime.tokenizer import Tokenizer
from trimtab.shapes import shape

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

TEXT_GROUP = 32
"""Texts of open length have a multiple of so many tokens: Z-Image needs it, and plans are kept for most prompts."""


@dataclass(frozen=True)
class Request:
    """One call of a pipeline, with every default filled in.

    Attributes:
        batch: Pictures.
        rows: 2 with classifier-free guidance, else 1.
        size: (width, height) in pixels.
        prompts: One a picture.
        negatives: One a picture; None where no negative prompt was given.
        labels: Class numbers, one a picture.
        guidance: The guidance scale.
        unguided: The one that changes nothing.
        image: (1, height, width, 3) in 0..1, or None.
        mask: (1, height, width, 1) in 0..1, or None.
        control: (1, height, width, 3) in 0..1, what a ControlNet draws along, or None.
        control_scale: How much it does.
        image_guidance: The guidance scale of the picture that is changed.
        noise: Where all random numbers come from, in the order of the task's inputs and steps.
        tokenizers: The bundle's, by name.
        tokens: Of every text, where inputs leave their number open (`text_length`).
    """

    batch: int
    rows: int
    size: tuple[int, int]
    noise: Noise
    prompts: tuple[str, ...] = ()
    negatives: tuple[str, ...] | None = None
    labels: tuple[int, ...] = ()
    guidance: float = 1.0
    unguided: int = 1
    image: Array | None = None
    mask: Array | None = None
    control: Array | None = None
    control_scale: float = 1.0
    image_guidance: float = 1.0
    tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)
    tokens: int = 0

    @property
    def symbols(self) -> dict[str, int]:
        """Values of the names in the shapes of a task's inputs."""
        width, height = self.size
        return {
            "batch": self.batch,
            "rows": self.rows,
            "width": width,
            "height": height,
            TEXT: self.tokens,
        }


class Noise:
    """Standard normals as diffusers draws them: one generator for the batch, or one a picture.

    Args:
        seeds: One seed for all pictures together, or as many as there are pictures.
    """

    def __init__(self, seeds: tuple[int, ...]) -> None:
        self.seeds = seeds
        self._generators = [NoiseGenerator(seed) for seed in seeds]

    def normal(self, shape: tuple[int, ...], shared: bool = False) -> Array:
        """Draws (n, ...) float32.

        Args:
            shape: What to draw.
            shared: All pictures share it, as the noise of the one picture that they start from.
        """
        if len(self._generators) == 1 or shape[0] == 1:
            return self._generators[0].normal(shape)
        rows = [generator.normal((1, *shape[1:])) for generator in self._generators]
        return np.concatenate(rows)

    def again(self) -> Noise:
        """The same numbers from the beginning."""
        return Noise(self.seeds)


class NoiseTape:
    """What a batch draws, for parts of it that are made one after the other: each sees its own rows.

    All parts draw the same things in the same order. The first one to ask draws for all.

    Args:
        noise: The batch's.
        batch: How many pictures it has.

    Attributes:
        seeds: The batch's.
    """

    def __init__(self, noise: Noise, batch: int) -> None:
        self.seeds = noise.seeds
        self._noise, self._batch = noise, batch
        self._drawn: list[Array] = []

    def part(self, pictures: Sequence[int]) -> Noise:
        """The noise of some of the pictures."""
        return _Part(self, tuple(pictures))

    def draw(self, number: int, shape: tuple[int, ...], shared: bool) -> Array:
        """The rows of all pictures in the draw of this number, or what they share."""
        if number == len(self._drawn):
            whole = shape if shared else (self._batch, *shape[1:])
            self._drawn.append(self._noise.normal(whole, shared))
        return self._drawn[number]


class _Part(Noise):
    """The rows of some pictures on a tape."""

    def __init__(self, tape: NoiseTape, pictures: tuple[int, ...]) -> None:
        self.seeds = tape.seeds
        self._tape, self._pictures, self._count = tape, pictures, 0

    def normal(self, shape: tuple[int, ...], shared: bool = False) -> Array:
        drawn = self._tape.draw(self._count, shape, shared)
        self._count += 1
        return drawn if shared else drawn[list(self._pictures)]

    def again(self) -> Noise:
        return _Part(self._tape, self._pictures)


def make_input(spec: TensorSpec, request: Request) -> Array:
    """The array for one input, of its dtype and shape.

    Raises:
        BundleError: The bundle asks for a kind of input that this trimtab does not know.
        InputError: The request lacks what the input needs.
    """
    kind = str(spec.source.get("kind", ""))
    if kind not in SOURCES:
        raise BundleError(f"the input {spec.name} is of the unknown kind {kind!r:.60}: upgrade trimtab")
    array = np.asarray(SOURCES[kind](spec, request), spec.dtype, order="C")
    wanted = shape(spec.shape, request.symbols)
    if array.shape != wanted:
        raise BundleError(f"the input {spec.name} came out as {array.shape} and the bundle says {wanted}")
    return array


def _texts(spec: TensorSpec, request: Request) -> list[str]:
    """The prompts as rows: all negative ones first, as diffusers stacks them.

    A model may want them stripped and in lower case, in a template, and an instruction before the others.
    """
    negatives = request.negatives if request.negatives is not None else ("",) * request.batch
    negatives, prompts = negatives if request.rows == 2 else (), request.prompts
    if spec.source.get("lowercase"):
        negatives, prompts = (tuple(text.lower().strip() for text in texts) for texts in (negatives, prompts))
    instruction, prefix, suffix = (str(spec.source.get(k, "")) for k in ("instruction", "prefix", "suffix"))
    return [prefix + text + suffix for text in (*negatives, *(instruction + text for text in prompts))]


def _tokenizer(spec: TensorSpec, request: Request) -> Tokenizer:
    name = str(spec.source.get("tokenizer", ""))
    if name not in request.tokenizers:
        raise BundleError(f"the input {spec.name} needs the tokenizer {name!r}, which the bundle lacks")
    return request.tokenizers[name]


def text_length(inputs: Iterable[TensorSpec], request: Request | None) -> int:
    """How many tokens texts have where inputs leave that open: as many as the longest of a request needs.

    Args:
        inputs: A task's.
        request: None for the most that any can have.

    Returns:
        A multiple of `TEXT_GROUP` or the most that there can be; 0 where nothing is left open.
    """
    lengths = [0]
    for spec in inputs:
        if spec.source.get("kind") != "tokens" or TEXT not in spec.shape:
            continue
        most = _whole(spec, "length")
        if request is None:
            lengths.append(most)
            continue
        words = _tokenizer(spec, request).encode(_texts(spec, request), warn=False)[1].sum(1)
        if request.rows == 2 and "negative_length" in spec.source:  # what is kept of them begins earlier
            words[: request.batch] += most - _whole(spec, "negative_length")
        lengths.append(min(-(-int(words.max()) // TEXT_GROUP) * TEXT_GROUP, most))
    return max(lengths)


def _cut(spec: TensorSpec, request: Request, tokens: Array) -> Array:
    """Without the padding that nothing reads, where a text's length is open."""
    return tokens[:, : request.tokens] if TEXT in spec.shape else tokens


def _tokens(spec: TensorSpec, request: Request) -> Array:
    ids, mask = _tokenizer(spec, request).encode(_texts(spec, request))
    # Negative prompts have less room than what has an instruction.
    if request.rows == 2 and "negative_length" in spec.source:
        kept = _whole(spec, "negative_length")
        if mask[: request.batch, kept:].any():
            logger.warning(
                "the negative prompt is longer than the %d tokens that are read of it and was cut", kept
            )
    return _cut(spec, request, ids)


def _token_mask(spec: TensorSpec, request: Request) -> Array:
    return _cut(spec, request, _tokenizer(spec, request).encode(_texts(spec, request), warn=False)[1])


def _given(spec: TensorSpec, request: Request) -> Array:
    """0 for rows of a negative prompt that was not given, where the model wants zeros for it; else 1."""
    given = np.ones((request.rows * request.batch, 1), np.float32)
    if spec.source.get("zeros") and request.negatives is None and request.rows == 2:
        given[: request.batch] = 0
    return given


def _positive(spec: TensorSpec, request: Request) -> Array:
    """1 for rows of prompts, 0 for those of negative ones."""
    positive = np.ones((request.rows * request.batch, 1), np.float32)
    if request.rows == 2:
        positive[: request.batch] = 0
    return positive


def class_names(spec: TensorSpec) -> dict[str, int]:
    """Names of the classes that an input of the kind "label" takes -> their numbers; empty where they have none.

    Raises:
        BundleError: They cannot be read.
    """
    try:
        names = json.loads(str(spec.source.get("names", "{}")))
        return {str(name): int(number) for name, number in names.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise BundleError(f"the names of {spec.name}'s classes cannot be read: compile again") from None


def _label(spec: TensorSpec, request: Request) -> Array:
    classes = _whole(spec, "classes")
    for label in request.labels:
        if not 0 <= label < classes:
            raise InputError(f"there is no class {label}: this model has 0 to {classes - 1}")
    null = (_whole(spec, "null"),) * request.batch
    return np.array([*(null if request.rows == 2 else ()), *request.labels], np.int64)


def _whole(spec: TensorSpec, key: str, least: int = 0) -> int:
    """A number of an input's source.

    Raises:
        BundleError: It is missing, or none.
    """
    value = spec.source.get(key)
    if type(value) is not int or not least <= value < 2**31:
        raise BundleError(
            f"the input {spec.name} has {key} {value!r:.60}, and a number is needed: compile again"
        )
    return value


def _mix(spec: TensorSpec, request: Request) -> Array:
    """The weights of the guidance rows: (1 - w, w) for the scale w where 1 guides nothing, or 1 without guidance."""
    weight = request.guidance + 1 - request.unguided
    weights = [1 - weight, weight] if request.rows == 2 else [1.0]
    return np.array(weights, np.float32)


def unguided(kinds: Mapping[str, TensorSpec]) -> int:
    """The guidance scale that changes nothing, from which down there is none, by a task's inputs."""
    mix = kinds.get("mix")
    return 1 if mix is None or "unguided" not in mix.source else _whole(mix, "unguided")


def _guidance(spec: TensorSpec, request: Request) -> Array:
    return np.array(request.guidance, np.float32)


def _drawn(spec: TensorSpec, request: Request) -> tuple[int, ...]:
    """What is drawn for an input, pictures along its first axis; raises BundleError where it has no axes."""
    if not spec.shape:
        raise BundleError(f"the noise {spec.name} is one number, and pictures need some each: compile again")
    return shape(spec.shape, request.symbols)


def _noise(spec: TensorSpec, request: Request) -> Array:
    sizes = _drawn(spec, request)
    return request.noise.normal(sizes, shared="batch" not in spec.shape)


def _posterior_noise(spec: TensorSpec, request: Request) -> Array:
    """One draw for all pictures, or where the model wants it one for each that has a seed of its own."""
    sizes = _drawn(spec, request)
    if spec.source.get("own") and len(request.noise.seeds) > 1:
        return request.noise.normal(sizes)
    return np.broadcast_to(request.noise.normal((1, *sizes[1:]), shared=True), sizes)


def _image(spec: TensorSpec, request: Request) -> Array:
    if request.image is None:
        raise needs_picture()
    return request.image


def needs_picture() -> InputError:
    """The error for a task whose picture is missing."""
    return InputError("this task needs a picture and none was given: give image= (--image FILE)")


def _mask(spec: TensorSpec, request: Request) -> Array:
    if request.mask is None:
        raise InputError("this task needs a mask and none was given: give mask= (--mask FILE)")
    return request.mask


def _control(spec: TensorSpec, request: Request) -> Array:
    if request.control is None:
        raise InputError(
            "this task needs a control picture and none was given: give control= (--control FILE)"
        )
    return request.control


def _control_scale(spec: TensorSpec, request: Request) -> Array:
    return np.array(request.control_scale, np.float32)


def _image_guidance(spec: TensorSpec, request: Request) -> Array:
    """The scale; 1, which changes nothing, where the text does not guide either."""
    return np.array(request.image_guidance if request.rows == 2 else 1.0, np.float32)


def _window_shifts(spec: TensorSpec, request: Request) -> Array:
    """Shifts of attention windows, drawn from the first seed by a generator of their own: noise stays diffusers'."""
    generator = np.random.RandomState(request.noise.seeds[0] & 0xFFFFFFFF)
    return generator.randint(_whole(spec, "shifts", 1), size=shape(spec.shape, request.symbols))


SOURCES: Mapping[str, Callable[[TensorSpec, Request], Array]] = {
    "tokens": _tokens,
    "token_mask": _token_mask,
    "given": _given,
    "positive": _positive,
    "label": _label,
    "mix": _mix,
    "guidance": _guidance,
    "noise": _noise,
    "posterior_noise": _posterior_noise,
    "image": _image,
    "mask": _mask,
    "control": _control,
    "control_scale": _control_scale,
    "image_guidance": _image_guidance,
    "window_shifts": _window_shifts,
}
"""Kind of input -> what makes it."""
