"""From loose arguments to the fields of a request: what a model takes, what it needs, and what is left out."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import BundleError, InputError, did_you_mean
from trimtab.program import Schedule, Task, TensorSpec, check_guidance, first_step
from trimtab.runtime.images import Pixels
from trimtab.runtime.inputs import class_names, unguided

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """The arguments of `trimtab.runtime.load.Pipeline.__call__`, which explains them."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    label: int | str | Sequence[int | str] | None = None
    guidance: float | None = None
    seed: int | Sequence[int] | None = None
    count: int = 1
    size: tuple[int, int] | None = None
    schedule: str | int | None = None
    image: str | Path | Image | Pixels | None = None
    mask: str | Path | Image | Pixels | None = None
    strength: float | None = None
    control: str | Path | Image | Pixels | None = None
    control_scale: float | None = None
    image_guidance: float | None = None


def check_count(count: int, size: tuple[int, int]) -> None:
    """Refuses a number of pictures whose pixels alone are more than the machine's memory, before lists are made of it.

    Args:
        count: Pictures for each prompt or label.
        size: (width, height) in pixels.

    Raises:
        InputError: No whole number, fewer than one, or too many.
    """
    if not is_whole(count):
        raise InputError(f"the count {count!r:.60} is no whole number: ask for one picture or more")
    if count < 1:
        raise InputError(f"{count} pictures were asked for: ask for one or more")
    each = size[0] * size[1] * 3 * 4  # float32, as a result holds them
    memory = _memory_bytes()
    if count * each > memory:
        raise InputError(
            f"{count} pictures of {size[0]}x{size[1]} take {count * each / 1e9:,.0f} GB, and this machine has "
            f"{memory / 1e9:,.0f}: ask for fewer at a time"
        )


def _memory_bytes() -> float:
    """The machine's memory; infinite where the system does not say, as Windows."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return np.inf


def guidance_scale(task: Task, kinds: Mapping[str, TensorSpec], guidance: float | None) -> tuple[float, int]:
    """The guidance scale and the number of rows that it takes."""
    if task.guidance is None:
        check_guidance(guidance, has_guidance=False)
        return 1.0, 1
    scale = _finite("guidance scale", task.guidance if guidance is None else guidance)
    mix = kinds.get("mix")
    return scale, 2 if mix is not None and _guides(mix, scale, unguided(kinds)) else 1


def _guides(mix: TensorSpec, scale: float, none: int) -> bool:
    """As in diffusers, a scale of 1 or less, or of 0 for some, turns classifier-free guidance off.

    Some pipelines (DreamLite's) have no such bound: there a scale below 1 leans to the negative prompt.
    """
    if not mix.source.get("classifier_free"):
        return False
    return scale != none if mix.source.get("below") else scale > none


def choose_schedule(
    names: Sequence[str], task: Task, schedule: str | int | None, strength: float | None
) -> str:
    """The name of a task's schedule.

    Args:
        names: Of the bundle's schedules; the first is the default.
        task: What to do.
        schedule: A name or a number of steps.
        strength: For tasks that start from a picture.
    """
    if schedule is None:
        name = names[0]
    else:
        matches = [n for n in names if n == str(schedule) or n.rpartition("-")[2] == str(schedule)]
        if not matches:
            raise InputError(f"there is no schedule {schedule!r} in this bundle: it has {', '.join(names)}")
        name = matches[0]
    if task.strength is None:
        if strength is not None:
            raise InputError(
                "a strength was given without a picture to start from: give image= (--image FILE) to a model that can, "
                "or leave it out"
            )
        return name
    share = task.strength if strength is None else number("strength", strength)
    if not 0 < share <= 1:
        raise InputError(f"the strength {share} is not above 0 and at most 1")
    if share == 1 and name in task.schedules:
        return name  # nothing of the picture is left in the start noise
    total = _whole_steps(task, name)
    start = first_step(total, share, task.strength_rounds_up)
    if (started := f"{name}/from-{start}") in task.schedules:
        return started
    able = possible_strengths(task, name)
    if not able:
        raise BundleError(f"{name} cannot start from a picture: compile the bundle again")
    if task.strength_steps:
        what = f"the strength {share} leaves too few of {total} steps"
    elif start >= total:
        what = f"the strength {share} leaves none of {total} steps"
    else:
        what = f"{name} cannot start at step {start}"
    raise InputError(f"{what}: use strength {min(able, key=lambda each: abs(each - share)):g}")


def _whole_steps(task: Task, name: str) -> int:
    """What a strength is a share of, for a schedule whose name ends with its number of steps (Raises BundleError)."""
    digits = name.rpartition("-")[2]
    if not digits.isdecimal() or len(digits) > 9:  # more are no schedule's, nor a float's
        raise BundleError(f"the schedule {name:.60} says no number of steps: compile the bundle again")
    return task.strength_steps or int(digits)


def possible_strengths(task: Task, name: str) -> list[float]:
    """The strengths, in thousandths, that a schedule whose name ends with its number of steps can start at."""
    total = _whole_steps(task, name)
    shares = [thousandths / 1000 for thousandths in range(1, 1001)]
    starts = [f"{name}/from-{first_step(total, each, task.strength_rounds_up)}" for each in shares]
    return [each for each, start in zip(shares, starts, strict=True) if start in task.schedules]


def for_size(task: Task, name: str, size: tuple[int, int]) -> tuple[str, Schedule]:
    """Of a schedule and those that stand beside it for larger pictures (``NAME/2x``), the one for a size.

    Args:
        task: What to do.
        name: Of the plain schedule.
        size: (width, height) in pixels.

    Raises:
        InputError: A side that the schedule cannot take.
        BundleError: There is none for the size.
    """
    beside = re.compile(re.escape(name) + r"(/\d+x)?")
    fitting = [
        (schedule.least_pixels, key, schedule)
        for key, schedule in task.schedules.items()
        if beside.fullmatch(key) and schedule.least_pixels <= size[0] * size[1]
    ]
    if not fitting:
        raise BundleError(f"no schedule {name} is for {size[0]}x{size[1]}: compile the bundle again")
    _, key, schedule = max(fitting, key=lambda entry: entry[0])
    multiple = schedule.size_multiple
    if any(side % multiple for side in size):
        near = tuple(max(multiple, round(side / multiple) * multiple) for side in size)
        raise InputError(
            f"{size[0]}x{size[1]} was asked for, and {key} needs both sides to be multiples of {multiple}, so that "
            f"its attention windows divide them: use {near[0]}x{near[1]}"
        )
    return key, schedule


def all_seeds(seed: int | Sequence[int] | None, batch: int) -> tuple[int, ...]:
    """One seed for all pictures, or one for each; a random one for None."""
    if seed is None:
        return (secrets.randbelow(2**32),)
    if isinstance(seed, Integral):
        return (int(seed),)
    seeds = _several(seed)
    if seeds is None or not all(map(is_whole, seeds)):
        raise InputError(f"the seed {seed!r:.60} is no whole number: give one, or one for each picture")
    if len(seeds) != batch:
        raise InputError(f"{len(seeds)} seeds were given for {batch} pictures: give one, or one for each")
    return tuple(map(int, seeds))


def whole_size(size: Sequence[int] | None) -> tuple[int, int] | None:
    """(width, height) as whole numbers; None for none."""
    if size is None:
        return None
    sides = _several(size)
    if sides is None or len(sides) != 2 or not all(map(is_whole, sides)):
        raise InputError(f"the size {size!r:.60} is not a width and a height in pixels")
    return int(sides[0]), int(sides[1])


def all_texts(
    kinds: Mapping[str, TensorSpec], prompt: str | Sequence[str] | None, count: int
) -> tuple[str, ...]:
    """A prompt for each picture; none for a model that reads none."""
    if "tokens" not in kinds:
        if prompt is not None:
            raise InputError("a prompt was given and this model does not read any: leave it out")
        return ()
    texts = [] if prompt is None else _texts("prompt", prompt)
    if not texts:
        raise InputError("no prompt was given and this model needs one: give prompt= (--prompt TEXT)")
    return tuple(text for text in texts for _ in range(count))


def _texts(what: str, value: str | Sequence[str]) -> list[str]:
    """One text, or several, as a list.

    Raises:
        InputError: It is neither, or no Unicode, as bytes of another encoding on a command line are none.
    """
    texts = [value] if isinstance(value, str) else _several(value)
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise InputError(f"the {what} {value!r:.60} is no text: give one, or one for each picture")
    for text in texts:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise InputError(f"the {what} {text!r:.60} is not valid Unicode: give it in UTF-8")
    return texts


def all_negatives(
    kinds: Mapping[str, TensorSpec], value: str | Sequence[str], batch: int, count: int
) -> tuple[str, ...]:
    """A negative prompt for each of ``batch`` pictures, ``count`` of which share a prompt."""
    if "tokens" not in kinds:
        raise InputError("a negative prompt was given and this model does not read any: leave it out")
    mix = kinds.get("mix")
    if mix is not None and not mix.source.get("classifier_free"):
        logger.warning("the negative prompt makes no difference: this model is not guided away from one")
    texts = _texts("negative prompt", value)
    if len(texts) not in (1, batch // count, batch):
        raise InputError(
            f"{len(texts)} negative prompts were given for {batch} pictures: give one, or one for each prompt"
        )
    return tuple(text for text in texts for _ in range(batch // len(texts)))


def all_labels(
    kinds: Mapping[str, TensorSpec], label: int | str | Sequence[int | str] | None, count: int
) -> tuple[int, ...]:
    """A class number for each picture; none for a model without classes."""
    if "label" not in kinds:
        if label is not None:
            raise InputError("a class was given and this model has none: leave it out")
        return ()
    several = [] if label is None or (isinstance(label, str) and not label) else _several(label)
    if several == []:
        raise InputError("no class was given and this model needs one: give label= (--class N)")
    labels: list[Any] = [label] if several is None else several
    names = class_names(kinds["label"])
    return tuple(number for value in labels for number in [_class_number(names, value)] * count)


def control_scale(kinds: Mapping[str, TensorSpec], picture: object, scale: float | None) -> float:
    """How much the picture that is drawn along counts, 1 by default; whether there is one where one is needed."""
    if "control" not in kinds:
        if picture is not None or scale is not None:
            what = "scale" if picture is None else "picture"
            raise InputError(
                f"a control {what} was given and this model draws along no picture: leave it out"
            )
        return 1.0
    if picture is None:
        raise InputError(
            "this model draws along a picture and none was given: give control= (--control FILE)"
        )
    if scale is not None and "control_scale" not in kinds:
        raise InputError(
            "a control scale was given and this model has none, only ControlNets do: leave it out"
        )
    return _finite("control scale", 1.0 if scale is None else scale)


def image_guidance_scale(kinds: Mapping[str, TensorSpec], scale: float | None) -> float:
    """The guidance scale of the picture that is changed, 1.5 by default as in diffusers; 1 for a model without."""
    if "image_guidance" not in kinds:
        if scale is not None:
            raise InputError(
                "an image guidance scale was given and this model has none, only InstructPix2Pix has: leave it out"
            )
        return 1.0
    found = _finite("image guidance scale", 1.5 if scale is None else scale)
    if found < 1:
        raise InputError(
            f"the image guidance scale {found:g} is below 1: give 1, which guides nothing, or more"
        )
    return found


def _finite(what: str, value: Any) -> float:
    """A number that float32 holds."""
    found = number(what, value)
    if not abs(found) <= float(np.finfo(np.float32).max):  # NaN neither
        raise InputError(f"the {what} {found} is not a finite number of 32 bits: give a smaller one")
    return found


def _class_number(names: Mapping[str, int], label: int | str) -> int:
    if isinstance(label, Integral):
        return int(label)
    if not isinstance(label, str):
        raise InputError(f"the class {label!r:.60} is neither a whole number nor a name: give one of them")
    if label in names:
        return names[label]
    with contextlib.suppress(ValueError):
        return int(label)
    hint = did_you_mean(label, names, "give its number")
    raise InputError(f"there is no class {label!r} in this model: {hint}")


def number(what: str, value: Any) -> float:
    """A real number, also as numpy has it.

    Raises:
        InputError: It is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"the {what} {value!r:.60} is no number: give one") from None


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, also as numpy has it."""
    return isinstance(value, Integral)


def _several(value: Any) -> list[Any] | None:
    """The elements of what has some; None for one thing, as a text, a number, or an array without axes."""
    if isinstance(value, str | bytes | bytearray) or getattr(value, "ndim", 1) == 0:
        return None
    return list(value) if isinstance(value, Iterable) and isinstance(value, Sized) else None


def plain(value: Any) -> Any:
    """An argument as JSON takes it."""
    if value is None or isinstance(value, str):
        return value
    return int(value) if isinstance(value, Integral) else [plain(each) for each in value]
