"""Schedules that follow the size of the picture.

Flow matching shifts its sigmas by an amount mu that is linear in the number of image tokens (Esser et al.
2024, https://arxiv.org/abs/2403.03206, sec. 5.3.2; Flux; two lines for Flux.2), so what is a constant of a step at
one size is another number at the next. A program has no code in it, so the numbers become a tensor: the segment "shift"
reads the shape of the start noise, makes the sigmas, and from them tables whose rows the steps read
(``next_weights_table[3]``).

No scheduler's update is written down here. Every schedule is planned at three sizes; where a constant
differs, each entry is held against a handful of sums over the step's own two sigmas, and the finished tables
against all three plans. What does not fit stays constant, and the program then says that it draws one size
only.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trimtab.errors import TrimtabError
from trimtab.export.examples import EVEN_LATENT, ROWS
from trimtab.export.parts import START_NOISE, Parts
from trimtab.export.sampler.schedules import (
    MANY_TOKENS,
    Sampling,
    image_tokens,
    patches_of_token,
    plan_tasks,
    probe_tasks,
    time_shift,
    timesteps_options,
)
from trimtab.export.trace import Example, trace
from trimtab.program import SHIFT, Call, Schedule, Step, Task

logger = logging.getLogger(__name__)

RELATIVE, ABSOLUTE = 1e-5, 1e-6
"""How far a table may be from the scheduler. Both are computed in float32 from sigmas of about 1, whose
rounding (6e-8) enters differences of them as it is, however small they are."""

_SCALARS = ("timestep",)
"""Constants that a graph reads as a scalar and not as a vector of one."""

Entry = tuple[float, float, int, float, int]
"""(a, c, i, d, j): a + c * sigma[i] + d * sigma[j]."""

Row = tuple[Entry, ...]
Floats = npt.NDArray[np.floating[Any]]
Tasks = Mapping[str, Task]


class _Misfit(Exception):
    """A table that does not follow the size; says why."""


@dataclass(frozen=True)
class Sigmas:
    """The sigmas of all numbers of steps in one row, without the final zeros, before they are shifted.

    Attributes:
        unshifted: (K,) float64 in (0, 1].
        offsets: Number of steps -> where its sigmas begin.
    """

    unshifted: Floats
    offsets: Mapping[int, int]

    @property
    def last(self) -> npt.NDArray[np.int64]:
        """(K,) For every sigma the index of the last one of its schedule."""
        return np.concatenate(
            [np.full(steps, offset + steps - 1) for steps, offset in self.offsets.items()]
        ).astype(np.int64)

    def of_steps(self, value: Callable[[int], float]) -> Floats:
        """(K,) For every sigma what the number of its schedule's steps comes to."""
        return np.concatenate([np.full(steps, value(steps)) for steps in self.offsets])


class ShiftedTables(nn.Module):
    """Start noise (batch, C, h, w), of which only the shape is read -> the tables, one result each, float32.

    As ``FlowMatchEulerDiscreteScheduler.set_timesteps`` computes it: mu from the tokens, the sigmas shifted
    (exponential or linear), then stretched to ``shift_terminal`` where there is one. Within `RELATIVE` and
    `ABSOLUTE` of it: it mixes float64 and float32, this is float32 throughout.

    Args:
        parts: The exported pipeline.
        config: The scheduler's.
        sigmas: Before the shift.
        tables: Name -> rows.
    """

    def __init__(
        self, parts: Parts, config: Mapping[str, Any], sigmas: Sigmas, tables: Mapping[str, Sequence[Row]]
    ) -> None:
        super().__init__()
        self.patch = parts.multiple // parts.factor
        self.patches = patches_of_token(parts.pipeline)
        self.exponential = config.get("time_shift_type", "exponential") == "exponential"
        self.terminal = config.get("shift_terminal")
        self.bends = parts.pipeline.startswith("Flux2")
        # mu = slope * tokens + offset, on each line
        for line, start in (("few", 0), *([("many", MANY_TOKENS + 1)] if self.bends else [])):
            first, second = (_mu(parts, config, sigmas, start + more) for more in (0, 1))
            slope = second - first
            self.register_buffer(f"{line}_slope", torch.tensor(slope, dtype=torch.float32))
            self.register_buffer(f"{line}_offset", torch.tensor(first - slope * start, dtype=torch.float32))
        self.names = tuple(tables)
        self.register_buffer("odds", torch.tensor(1 / sigmas.unshifted - 1, dtype=torch.float32))
        self.register_buffer("last", torch.from_numpy(sigmas.last))
        for name, rows in tables.items():
            entries = np.array([list(row) for row in rows], np.float64)  # (rows, width, 5)
            if name in _SCALARS:
                entries = entries[:, 0]
            for part, column in (("bias", 0), ("first_weight", 1), ("second_weight", 3)):
                self.register_buffer(
                    f"{name}_{part}", torch.tensor(entries[..., column], dtype=torch.float32)
                )
            for part, column in (("first_index", 2), ("second_index", 4)):
                index = torch.tensor(entries[..., column].ravel(), dtype=torch.int64)
                self.register_buffer(f"{name}_{part}", index)

    def forward(self, noise: Tensor) -> tuple[Tensor, ...]:
        tokens = (noise.shape[2] // self.patch) * (noise.shape[3] // self.patch) // self.patches
        count = torch.ones(1) * tokens
        mu = self._line("few", count)
        if self.bends:
            mu = torch.where(count > MANY_TOKENS, self._line("many", count), mu)
        shift = torch.exp(mu) if self.exponential else mu
        sigmas = shift / (shift + self.get_buffer("odds"))
        if self.terminal:
            rest = 1 - sigmas
            sigmas = 1 - rest * (1 - self.terminal) / rest.index_select(0, self.get_buffer("last"))
        return tuple(self._table(name, sigmas) for name in self.names)

    def _line(self, line: str, count: Tensor) -> Tensor:
        return count * self.get_buffer(f"{line}_slope") + self.get_buffer(f"{line}_offset")

    def _table(self, name: str, sigmas: Tensor) -> Tensor:
        table = self.get_buffer(f"{name}_bias")
        for part in ("first", "second"):
            weights = self.get_buffer(f"{name}_{part}_weight")
            # Flat, so that it becomes Gather, which every engine has, and not GatherND.
            chosen = sigmas.index_select(0, self.get_buffer(f"{name}_{part}_index"))
            table = table + weights * chosen.reshape(weights.shape)
        return table


def follow_size(parts: Parts, sampling: Sampling, tasks: Tasks) -> dict[str, Task]:
    """Tasks whose schedules are right at every size; adds the segment `SHIFT` where they need it.

    Where that cannot be done, the tasks come back as they are and ``parts.fixed_size`` says why.

    Args:
        parts: The exported pipeline, at its native size.
        sampling: What the tasks were planned with.
        tasks: From `plan_tasks`.
    """
    if not sampling.scheduler.config.get("use_dynamic_shifting") or parts.fixed_size:
        return dict(tasks)
    try:
        module, followed = shifted(parts, sampling, tasks)
    except _Misfit as reason:
        logger.debug("the schedules are constants: %s", reason)
        parts.fixed_size = f"its schedule depends on the size ({reason}): compile with --size WxH"
        return dict(tasks)
    if module is not None:
        height, width = EVEN_LATENT
        noise = torch.zeros(ROWS, parts.channels, height, width)
        example = Example(noise, ("batch", None, "latent_height", "latent_width"))
        model = trace(module, {"noise": example}, [_table_name(name) for name in module.names])
        parts.segments[SHIFT] = parts.keep(SHIFT, model)
    return followed


def shifted(parts: Parts, sampling: Sampling, tasks: Tasks) -> tuple[ShiftedTables | None, dict[str, Task]]:
    """The tables of all schedules, and the tasks that read them; None where nothing depends on the size.

    Raises:
        _Misfit: The schedules are not sums over shifted sigmas.
    """
    owner = type(sampling.scheduler).__name__
    if owner != "FlowMatchEulerDiscreteScheduler":
        raise _Misfit(f"{owner} shifts in a way of its own")
    sizes = _sizes(parts)
    try:
        others = [_plan(parts, sampling, size) for size in sizes[1:]]
    except TrimtabError as error:
        raise _Misfit(f"{owner} cannot be read at another size: {error}") from error
    plans = [tasks, *others]
    config = sampling.scheduler.config
    sigmas = _unshifted(parts, sampling)
    shifts = [_mu(parts, config, sigmas, image_tokens(parts, size)) for size in sizes]
    at_sizes = np.stack([_shift(config, sigmas, mu) for mu in shifts])
    tables: dict[str, dict[Row, int]] = {}
    fit = _Fit(at_sizes, float(config.get("num_train_timesteps", 1000)), tables)
    followed = {}
    for name, task in tasks.items():
        loops = {}
        for schedule, loop in task.schedules.items():
            versions = [_same(plan, name, schedule) for plan in plans]
            steps = int(schedule.partition("/")[0].rpartition("-")[2])
            loops[schedule] = _loop(loop, versions, fit, sigmas.offsets[steps], steps)
        followed[name] = replace(task, schedules=loops)
    if not tables:
        return None, followed
    names = [_table_name(name) for name in tables]
    call = Call(SHIFT, {"noise": START_NOISE}, {name: name for name in names})
    followed = {name: _with_prologue(task, call) for name, task in followed.items()}
    rows = {name: tuple(numbers) for name, numbers in tables.items()}
    module = ShiftedTables(parts, config, sigmas, rows)
    for size, plan in zip(sizes, plans, strict=True):
        _verify(module, parts, size, followed, plan)
    return module, followed


def _plan(parts: Parts, sampling: Sampling, size: tuple[int, int]) -> dict[str, Task]:
    """What the tasks would be, were this the native size."""
    other = copy.copy(parts)
    other.size = size
    return plan_tasks(other, probe_tasks(other, sampling))[0]


def _sizes(parts: Parts) -> list[tuple[int, int]]:
    """The native size, the smallest, and one half as large again: what a shift does shows between them."""
    unit = parts.multiple
    larger = tuple(-(-3 * side // (2 * unit)) * unit for side in parts.size)
    return [parts.size, (unit, unit), (larger[0], larger[1])]


def _unshifted(parts: Parts, sampling: Sampling) -> Sigmas:
    """The sigmas that the scheduler starts from: those of the shift that changes nothing."""
    scheduler = type(sampling.scheduler).from_config(sampling.scheduler.config, shift_terminal=None)
    neutral = 0.0 if scheduler.config.get("time_shift_type", "exponential") == "exponential" else 1.0
    found, offsets, total = [], {}, 0
    for steps in dict.fromkeys(sampling.steps):
        options = timesteps_options(scheduler, steps, parts) | {"mu": neutral}
        if "sigmas" not in options:
            options["num_inference_steps"] = steps
        scheduler.set_timesteps(device="cpu", **options)
        found.append(scheduler.sigmas[:-1].double().numpy())
        offsets[steps] = total
        total += steps
        if len(found[-1]) != steps:
            raise _Misfit(f"{len(found[-1])} sigmas for {steps} steps")
    together = np.concatenate(found)
    if not ((together > 0) & (together <= 1)).all():
        raise _Misfit("sigmas outside of 0 to 1")
    return Sigmas(together, offsets)


def _mu(parts: Parts, config: Mapping[str, Any], sigmas: Sigmas, tokens: int) -> Floats:
    """(K,) By how much every sigma is shifted."""
    return sigmas.of_steps(lambda steps: time_shift(parts.pipeline, config, steps, tokens))


def _shift(config: Mapping[str, Any], sigmas: Sigmas, mu: Floats) -> Floats:
    """(K,) What `ShiftedTables` computes, in float64."""
    shift = np.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
    shifted: Floats = shift / (shift + (1 / sigmas.unshifted - 1))
    if config.get("shift_terminal"):
        rest = 1 - shifted
        shifted = 1 - rest * (1 - config["shift_terminal"]) / rest[sigmas.last]
    return shifted


def _same(plan: Tasks, task: str, schedule: str) -> Schedule:
    loop = plan[task].schedules.get(schedule) if task in plan else None
    if loop is None:
        raise _Misfit(f"{schedule} is not there at every size")
    return loop


def _loop(loop: Schedule, versions: Sequence[Schedule], fit: _Fit, offset: int, steps: int) -> Schedule:
    """A schedule whose steps read their varying constants from tables."""
    if len(loop.steps) > steps or any(len(other.steps) != len(loop.steps) for other in versions):
        raise _Misfit("its evaluations are not its steps")
    found = []
    skipped = steps - len(loop.steps)
    same = [[other.steps[index] for other in versions] for index in range(len(loop.steps))]
    # A constant is one in the whole loop, or a row in all of it: the first step is at the sigma 1 in every size.
    varying = {
        name
        for step, others in zip(loop.steps, same, strict=True)
        for name in step.constants
        if any(other.constants[name] != step.constants[name] for other in others)
    }
    for index, (step, others) in enumerate(zip(loop.steps, same, strict=True)):
        if any((other.calls, other.draws) != (step.calls, step.draws) for other in others):
            raise _Misfit("its calls change with the size")
        last = skipped + index + 1 == steps
        found.append(fit.step(step, others, varying, offset + skipped + index, last))
    return replace(loop, steps=tuple(found))


class _Fit:
    """Finds what every varying constant is made of, and collects the rows of the tables.

    Args:
        sigmas: (sizes, K) float64, shifted.
        unit: Time steps to a sigma of 1.
        tables: Constant -> row -> its number; grows.
    """

    def __init__(self, sigmas: Floats, unit: float, tables: dict[str, dict[Row, int]]) -> None:
        self.sigmas = sigmas
        self.unit = unit
        self.tables = tables

    def step(
        self, step: Step, versions: Sequence[Step], varying: Container[str], index: int, last: bool
    ) -> Step:
        """The step with slices in place of what varies in its loop; ``index`` is that of its own sigma."""
        constants, slices = {}, {}
        for name, values in step.constants.items():
            if name not in varying:
                constants[name] = values
                continue
            found = np.array([other.constants[name] for other in versions])  # (sizes, width)
            row = tuple(self._entry(name, column, index, last) for column in found.T)
            rows = self.tables.setdefault(name, {})
            slices[name] = f"{_table_name(name)}[{rows.setdefault(row, len(rows))}]"
        calls = tuple(
            replace(call, inputs={key: slices.get(tensor, tensor) for key, tensor in call.inputs.items()})
            for call in step.calls
        )
        return replace(step, calls=calls, constants=constants)

    def _entry(self, name: str, values: Floats, index: int, last: bool) -> Entry:
        if (values == values[0]).all():
            return (float(values[0]), 0.0, 0, 0.0, 0)
        following = 0 if last else index + 1  # behind the last sigma comes 0
        weight = 0.0 if last else 1.0
        candidates: tuple[Entry, ...] = (
            (0.0, self.unit, index, 0.0, 0),
            (0.0, weight, following, -1.0, index),
            (0.0, 1.0, index, 0.0, 0),
            (1.0, -1.0, index, 0.0, 0),
            (0.0, weight, following, 0.0, 0),
            (1.0, -weight, following, 0.0, 0),
        )
        for entry in candidates:
            bias, first, i, second, j = entry
            if _close(bias + first * self.sigmas[:, i] + second * self.sigmas[:, j], values):
                return entry
        raise _Misfit(f"{name} is not a sum of a constant and two sigmas")


def _table_name(constant: str) -> str:
    return f"{constant}_table"


def _with_prologue(task: Task, call: Call) -> Task:
    """The task with a call before every schedule that reads a table."""

    def with_call(loop: Schedule) -> Schedule:
        read = {tensor for step in loop.steps for one in step.calls for tensor in one.inputs.values()}
        tables = {tensor.partition("[")[0] for tensor in read} & set(call.outputs.values())
        return replace(loop, prologue=(*loop.prologue, call)) if tables else loop

    return replace(task, schedules={name: with_call(loop) for name, loop in task.schedules.items()})


def _verify(module: ShiftedTables, parts: Parts, size: tuple[int, int], tasks: Tasks, plan: Tasks) -> None:
    """Holds every row that a step reads against the constant in its place, at one size."""
    width, height = (side // parts.factor for side in size)
    tables = {
        _table_name(name): table.numpy()
        for name, table in zip(module.names, module(torch.empty(1, 1, height, width)), strict=True)
    }
    for task, schedule, index, step in (
        (task, schedule, index, step)
        for task, found in tasks.items()
        for schedule, loop in found.schedules.items()
        for index, step in enumerate(loop.steps)
    ):
        wanted = plan[task].schedules[schedule].steps[index]
        for call, plain in zip(step.calls, wanted.calls, strict=True):
            for key, tensor in call.inputs.items():
                table, _, number = tensor.rstrip("]").partition("[")
                if table in tables and not _close(
                    np.atleast_1d(tables[table][int(number)]), np.array(wanted.constants[plain.inputs[key]])
                ):
                    raise _Misfit(f"{plain.inputs[key]} of {schedule} does not follow {size[0]}x{size[1]}")


def _close(found: Floats, expected: Floats) -> bool:
    return bool(np.allclose(found, expected, rtol=RELATIVE, atol=ABSOLUTE))
