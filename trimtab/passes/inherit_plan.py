"""What is inherited and when, as plain data: from a number, a TOML or JSON file, or a search."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.toml_file import read_toml

FILE = "inherit.json"
"""Where a bundle keeps a plan that was searched for."""

FULL = ""
"""Stands for a step that inherits nothing."""

_NEEDED = "a whole number from 1, or a TOML or JSON file with a plan, is needed"


@dataclass(frozen=True)
class InheritPlan:
    """Which features are inherited from an earlier step, and at which steps.

    Attributes:
        skip: What a step that inherits does not run: "branch K", "blocks I-J", "layers", "self-attention",
            "cross-attention", "feed-forward", "convolution", or module names with ``*`` (see
            `trimtab.passes.regions`). Empty for the model's default. All of them are skipped together, except
            with ``choices``.
        every: Every N-th evaluation runs in full.
        full: In place of ``every``: the evaluations that run in full, counted from 0 on the whole schedule.
        choices: In place of both: schedule -> for every evaluation what it skips, one of ``skip`` or `FULL`.
        dense_start: The first evaluations, which all run in full.
        dense_end: The last ones.
        speed: Look for the schedule: this many times as fast as full evaluations, by MACs, with the least drift
            (`trimtab.calibration.drift`).
        prompts: What a search draws, for models that read text; empty for plain things of many kinds
            (`trimtab.calibration.trajectories.PROMPTS`).
    """

    skip: tuple[str, ...] = ()
    every: int | None = None
    full: tuple[int, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dense_start: int = 0
    dense_end: int = 0
    speed: float | None = None
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        modes = [self.every is not None, bool(self.full), bool(self.choices), self.speed is not None]
        if sum(modes) != 1:
            raise InputError(
                "a plan of inheritance says one of every = N, full = [...], speed = S and [choices]; "
                f"this one says {sum(modes)} of them"
            )
        for name, texts in (("skip", self.skip), ("prompts", self.prompts)):
            if any(not isinstance(text, str) or not text for text in texts):
                raise InputError(f"{name} = {list(texts)!r:.60}: texts are needed")
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            raise InputError(f"every {self.every!r} evaluations: a whole number from 1 is needed")
        if any(type(step) is not int or step < 0 for step in self.full):
            raise InputError(f"full = {list(self.full)}: whole numbers from 0 are needed")
        if any(type(n) is not int or n < 0 for n in (self.dense_start, self.dense_end)):
            raise InputError("dense_start and dense_end must be whole numbers from 0")
        number = isinstance(self.speed, int | float) and not isinstance(self.speed, bool)
        if self.speed is not None and not (number and self.speed > 1):
            raise InputError(f"speed = {self.speed!r:.60}: a number above 1 is needed")
        if self.prompts and self.speed is None:
            raise InputError(
                "prompts are what a search draws, and the plan asks for no speed: leave them out"
            )
        for name, choices in self.choices.items():
            if unknown := [choice for choice in choices if choice not in (FULL, *self.skip)]:
                raise InputError(f"the choices of {name} name {unknown[0]!r}, which is not in skip")
        self._check_first()

    def _check_first(self) -> None:
        """Refuses a plan whose first evaluation would read what none has made: a loop has no other start."""
        first = "evaluation 0 has nothing to inherit: let it be a full one"
        if self.full and 0 not in self.full and self.dense_start == 0:
            raise InputError(f"full = {list(self.full)!s:.60}: {first}")
        for name, choices in self.choices.items():
            if choices and choices[0] != FULL:
                raise InputError(f"the choices of {name} begin with {choices[0]!r}: {first}")

    def wants_full(self, index: int, total: int, since: int | None) -> bool:
        """Whether an evaluation is to run in full. Not for plans with ``choices``.

        Args:
            index: Of the evaluation on the whole schedule.
            total: Its length.
            since: How long ago the last full one ran; None where none did.
        """
        if index < self.dense_start or index >= total - self.dense_end:
            return True
        if self.every is not None:
            return since is None or since >= self.every
        return index in self.full


def make_plan(value: Any) -> InheritPlan:
    """A plan from a number (every N-th), a mapping of the fields, or a file that holds one.

    Raises:
        InputError: It is none of them, or a field does not fit.
    """
    if isinstance(value, InheritPlan):
        return value
    if isinstance(value, str) and value.removeprefix("-").isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise InputError(f"inherit {value}: {_NEEDED}")
        return InheritPlan(every=value)
    if isinstance(value, str | Path):
        if not Path(value).exists():
            raise InputError(f"inherit {value}: the file does not exist: {_NEEDED}")
        value = _read(Path(value))
    if not isinstance(value, Mapping):
        raise InputError(f"the plan of inheritance {value!r} is not a number, a file or a table")
    known = {f.name for f in dataclasses.fields(InheritPlan)}
    if unknown := sorted(set(value) - known):
        raise InputError(f"a plan of inheritance has no {unknown[0]!r}: known are {', '.join(sorted(known))}")
    fields = dict(value)
    try:
        for name in ("skip", "prompts"):
            if isinstance(fields.get(name), str):
                fields[name] = (fields[name],)
        for name in ("skip", "full", "prompts"):
            if name in fields:
                fields[name] = tuple(fields[name])
        if "choices" in fields:
            fields["choices"] = {name: tuple(steps) for name, steps in fields["choices"].items()}
        return InheritPlan(**fields)
    except (TypeError, AttributeError) as error:
        raise InputError(f"the plan of inheritance cannot be understood: {error}") from None


def save_plan(plan: InheritPlan, path: Path) -> None:
    """Writes a plan as JSON, which `make_plan` reads."""
    known = {
        f.name: getattr(plan, f.name)
        for f in dataclasses.fields(plan)
        if getattr(plan, f.name) not in (None, (), {}, 0)
    }
    path.write_text(json.dumps(known, indent=1), encoding="utf-8")


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as JSON ({error}): mend it") from None
    return read_toml(path)
