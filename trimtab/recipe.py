"""What to compile, as one frozen value: from keywords, from the command line, or from a TOML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.passes.inherit_plan import InheritPlan, make_plan
from trimtab.program import TASKS

PRECISIONS = ("fp32", "fp16", "bf16")
DEFAULT_STEPS = 20
VQ_BITS = (2, 3, 4)

MEASURES = ("parameters", "bytes", "time")
"""What a share to remove may be of."""

HANDCRAFTED = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")
METHODS = ("output-loss", *HANDCRAFTED, "magnitude", "random")
"""How what is removed may be chosen (`trimtab.calibration.planning`)."""


_TEXT: tuple[tuple[type, ...], str] = ((str,), "a text")
_PATH: tuple[tuple[type, ...], str] = ((str, Path), "a path")
_NUMBER: tuple[tuple[type, ...], str] = ((int, float), "a number")
_TRUTH: tuple[tuple[type, ...], str] = ((bool,), "true or false")

_KINDS = {
    **dict.fromkeys(
        ("targets", "tasks", "keep", "drop", "scheduler", "precision", "remove_of", "remove_by"), _TEXT
    ),
    **dict.fromkeys(("scores", "removal_plan", "drifts", "vq_codebooks"), _PATH),
    **dict.fromkeys(("eta", "guidance", "remove", "vq_minutes"), _NUMBER),
    **dict.fromkeys(("vq_scale", "hidiffusion", "hoist"), _TRUTH),
    "vq": ((int,), "2, 3 or 4"),
}
"""Field of a recipe -> what its value, or each of its values, must be; the others are checked where they are read."""

_LISTS = ("targets", "tasks", "keep", "drop")
"""Those with several values."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a bundle holds.

    Attributes:
        targets: Devices to build engines for.
        steps: Numbers of sampler steps, one schedule each.
        scheduler: A scheduler's name; None for the pipeline's own.
        size: Native (width, height) in pixels; None for the model's.
        buckets: Further sizes that engines of fixed sizes are made for.
        eta: For schedulers that take it (DDIM, TCD); None for their default.
        tasks: What the bundle is to do, of `trimtab.program.TASKS`; none for all that the model does.
        guidance: The scale that is taken where none is asked for, and that engines of fixed sizes are made for: from 1
            down they have one row for each picture, and cannot be guided. None for the pipeline's own.
        remove: The share of the denoiser to remove, in 0..1.
        remove_of: What it is a share of, one of `MEASURES`: bytes of the weights as they are exported, or the time of
            a step that is predicted for the one target whose peaks are known.
        remove_by: How they are chosen: one of `METHODS`.
        keep: Globs of modules that are not removed.
        drop: Globs of modules that are removed in any case.
        scores: A file of losses that `trimtab score` wrote; what it lacks is measured and added.
        removal_plan: A saved plan, or a student's folder of `trimtab distill`, in the place of what removes above.
        precision: Of the weights and of the arithmetic; None for each target's own: fp16 on GPUs, fp32 on CPUs.
        inherit: What steps inherit from earlier ones; None for nothing.
        drifts: A file that a search for what to inherit adds its measurements to, and goes on from.
        switch: Other denoisers, each with the share of the steps at which it takes over, in rising order: a bundle, or
            a removal plan or student as in ``removal_plan``, carried out on the model as it was exported.
        vq: Bits of a packed weight of the denoiser, 2, 3 or 4; None for weights as they are.
        vq_rules: Pattern of module paths -> bits or "keep", before the rule that a layer of a repeated block is
            packed; the first that fits decides.
        vq_scale: Whether every output channel of a packed weight has a factor of its own.
        vq_minutes: Of calibration of the packed weights; None for k-means alone.
        vq_codebooks: A folder where codebooks are kept, and found again when the work is cut off.
        hidiffusion: Draw pictures larger than the model was trained for by HiDiffusion.
        hoist: Take what is known before the steps out of them: into tables, or into a segment that runs once.
    """

    targets: tuple[str, ...] = ("cpu",)
    steps: tuple[int, ...] = (DEFAULT_STEPS,)
    scheduler: str | None = None
    size: tuple[int, int] | None = None
    buckets: tuple[tuple[int, int], ...] = ()
    eta: float | None = None
    tasks: tuple[str, ...] = ()
    guidance: float | None = None
    remove: float | None = None
    remove_of: str = "parameters"
    remove_by: str = "output-loss"
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    scores: str | None = None
    removal_plan: str | None = None
    precision: str | None = None
    inherit: InheritPlan | None = None
    drifts: str | None = None
    switch: tuple[tuple[str, float], ...] = ()
    vq: int | None = None
    vq_rules: tuple[tuple[str, int | str], ...] = ()
    vq_scale: bool = False
    vq_minutes: float | None = None
    vq_codebooks: Path | None = None
    hidiffusion: bool = False
    hoist: bool = False

    def __post_init__(self) -> None:
        if not self.steps or any(type(n) is not int or n < 1 for n in self.steps):
            raise InputError(f"steps {_shown(self.steps)}: whole numbers from 1 are needed")
        if any(len(set(given)) != len(given) for given in (self.steps, self.targets, self.tasks)):
            raise InputError("a number of steps, a target or a task is given twice: give each once")
        if not self.targets:
            raise InputError("no target is given: give at least one, such as cpu")
        sizes = (*(() if self.size is None else (self.size,)), *self.buckets)
        for size in sizes:
            if len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
                raise InputError(f"the size {_shown(size)} is not a width and a height in pixels")
        if self.buckets and self.size is None:
            raise InputError("further sizes are given without the native one: give size too")
        if len(set(sizes)) != len(sizes):
            raise InputError("a size is given twice: give each once")
        if self.precision not in (None, *PRECISIONS):
            raise InputError(f"the precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise InputError(f"eta {self.eta} is not from 0 to 1")
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise InputError(f"there is no task {unknown[0]}: choose of {', '.join(TASKS)}")
        if self.guidance is not None and not abs(self.guidance) < math.inf:
            raise InputError(f"the guidance scale {self.guidance} is not a finite number")
        if self.remove is not None and not 0 < self.remove < 1:
            raise InputError(f"the share {self.remove} of layers to remove is not between 0 and 1")
        if self.remove_of not in MEASURES:
            raise InputError(f"remove_of {self.remove_of!r} is not one of {', '.join(MEASURES)}")
        if self.remove_by not in METHODS:
            raise InputError(f"there is no method {self.remove_by}: choose one of {', '.join(METHODS)}")
        if self.remove is None and self.remove_by != METHODS[0]:
            raise InputError("how to choose is given, and no share to remove: give remove as well")
        if self.remove is None and self.remove_of != "parameters":
            raise InputError("what a share is of is given, and no share to remove: give remove as well")
        if self.remove is not None and self.removal_plan is not None:
            raise InputError("both a share to remove and a removal plan are given: give one of them")
        if self.remove is None and (self.keep or self.drop or self.scores):
            raise InputError(
                "what to keep, drop or score is given, and no share to remove: give remove as well"
            )
        if self.drifts is not None and (self.inherit is None or self.inherit.speed is None):
            raise InputError("drifts are measured by a search, and no plan of inheritance asks for a speed")
        for path, share in self.switch:
            if not path or not isinstance(share, int | float) or not 0 < share < 1:
                raise InputError(
                    f"the switch to {path or 'nothing'} at {share}: PATH@SHARE is needed, a bundle or a removal plan "
                    "and a share of the steps between 0 and 1"
                )
        shares = [share for _, share in self.switch]
        if sorted(shares) != shares:
            raise InputError(
                f"the denoisers take over at {_shown(tuple(shares))}: shares in rising order are needed"
            )
        if self.vq is not None and self.vq not in VQ_BITS:
            raise InputError(f"vq {self.vq!r}: weights are packed to 2, 3 or 4 bits")
        if self.vq_minutes is not None and not self.vq_minutes > 0:
            raise InputError(f"vq_minutes {self.vq_minutes}: more than 0 are needed, or leave it out")
        if any(bits not in (*VQ_BITS, "keep") for _, bits in self.vq_rules):
            raise InputError('a vq rule gives neither 2, 3 or 4 bits nor "keep": write PATTERN=BITS')
        if self.vq is None and (self.vq_rules or self.vq_scale or self.vq_minutes or self.vq_codebooks):
            raise InputError("something is said about packed weights and none are asked for: give vq as well")


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from loosely typed values: lists for tuples, ``"WxH"`` for sizes, one value for a list of one.

    Raises:
        InputError: An unknown name or a value of the wrong kind.
    """
    known = {field.name for field in dataclasses.fields(Recipe)}
    if unknown := sorted(set(values) - known):
        raise InputError(f"a recipe has no {unknown[0]!r}: known are {', '.join(sorted(known))}")
    clean = {name: value for name, value in values.items() if value is not None}
    for name in (*_LISTS, "steps"):
        if name in clean:
            clean[name] = tuple(_listed(clean[name]))
    for name, (kinds, needed) in _KINDS.items():
        for value in clean.get(name, ()) if name in _LISTS else [clean.get(name)]:
            # A truth is a whole number to Python, and "no" is true.
            if value is not None and (
                not isinstance(value, kinds) or (type(value) is bool and bool not in kinds)
            ):
                raise InputError(f"{name} = {value!r:.60} in a recipe: {needed} is needed")
    if "size" in clean:
        clean["size"] = _size(clean["size"])
    if "buckets" in clean:
        clean["buckets"] = tuple(map(_size, _listed(clean["buckets"])))
    if "inherit" in clean:
        clean["inherit"] = make_plan(clean["inherit"])
    if "switch" in clean:
        clean["switch"] = _pairs("switch", clean["switch"], _switch, "PATH@SHARE")
    if "vq_rules" in clean:
        clean["vq_rules"] = _pairs("vq_rules", clean["vq_rules"], _rule, "PATTERN=BITS")
    if "vq_codebooks" in clean:
        clean["vq_codebooks"] = Path(clean["vq_codebooks"])
    return Recipe(**clean)


def _pairs(
    name: str, given: Any, split: Callable[[Any], tuple[str, Any]], form: str
) -> tuple[tuple[str, Any], ...]:
    """A table, or a list of texts or pairs, as pairs."""
    try:
        pairs = given.items() if isinstance(given, Mapping) else map(split, _listed(given))
        return tuple((str(key), value) for key, value in pairs)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} = {given!r:.60} in a recipe: a table, or a list of {form}, is needed"
        ) from None


def _listed(value: Any) -> Any:
    """One value as a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def _switch(switch: Any) -> tuple[str, Any]:
    """``"PATH@SHARE"``, or a pair already."""
    if not isinstance(switch, str):
        path, share = switch
        return path, share
    path, _, text = switch.rpartition("@")
    try:
        return path, float(text)
    except ValueError:
        return path, text


def _rule(rule: Any) -> tuple[str, int | str]:
    """``"PATTERN=BITS"``, or a pair already."""
    if not isinstance(rule, str):
        return tuple(rule)
    pattern, _, bits = rule.rpartition("=")
    return pattern, int(bits) if bits.isdecimal() else bits


def _size(value: Any) -> Any:
    if isinstance(value, str):
        return parse_size(value)
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def parse_size(text: str) -> tuple[int, int]:
    """``"512x768"`` as (width, height).

    Raises:
        InputError: Not two whole numbers with an x between them.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) > 0 and int(height) > 0):
        raise InputError(f"the size {text!r} is not WIDTHxHEIGHT in pixels, such as 512x512")
    return int(width), int(height)


def _shown(values: object) -> str:
    return ", ".join(map(str, values)) if isinstance(values, tuple) else str(values)
