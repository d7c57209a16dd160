"""Walks a program: buffers made once, bound once, and then nothing but engine calls.

A `Plan` is everything that can be decided before the first number is drawn. Walking it again with another
prompt or seed allocates nothing and binds nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trimtab.errors import BundleError, InputError
from trimtab.manifest import Contents, SegmentEntry
from trimtab.program import SLICE, STATE, Call, Schedule, Step, Task, TensorSpec, needed, reads
from trimtab.runtime.constants import Constants, once
from trimtab.runtime.inputs import Request, make_input
from trimtab.runtime.sessions.base import Backend, Buffer, Run, Session, in_turn
from trimtab.runtime.tiles import bind_tiled
from trimtab.shapes import bind, shape

OnStep = Callable[[int, int], None]
"""Told (steps done, steps in all)."""


OnCall = Callable[[str, float], None]
"""Told (segment, seconds) after every engine call."""


class BoundCall(NamedTuple):
    """An engine call ready to run, and the buffers that it reads and writes."""

    segment: str
    run: Run
    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]


class BoundCalls(NamedTuple):
    """Calls in order, one by one or all at once. Steps that call the same on the same buffers share them."""

    calls: tuple[BoundCall, ...]
    run_all: Run
    wait: Run

    def run(self, on_call: OnCall | None) -> None:
        """Runs the calls; returns once they are queued, or done where their times are wanted."""
        if on_call is None:
            self.run_all()
            return
        for segment, run, _, _ in self.calls:
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            on_call(segment, time.perf_counter() - start)


@dataclass(frozen=True)
class BoundStep:
    """A step ready to run.

    Attributes:
        draws: Noise buffers to fill, in order.
        constants: All of this step's, packed, in the memory of the device.
        place: Where the calls read them.
        bound: Engine calls, in order.
        results: Graph output -> buffer, over all calls.
    """

    draws: tuple[Buffer, ...]
    constants: Buffer
    place: Buffer
    bound: BoundCalls
    results: Mapping[str, Buffer]

    @property
    def calls(self) -> tuple[BoundCall, ...]:
        """Engine calls, in order; what they read of this step is in place after `begin`."""
        return self.bound.calls

    def begin(self, request: Request) -> None:
        """Draws the step's noise, and puts its constants where the calls read them."""
        for buffer in self.draws:
            buffer[...] = request.noise.normal(buffer.shape)
        self.place[...] = self.constants

    def run(self, request: Request, on_call: OnCall | None = None) -> None:
        """Begins the step and runs its calls."""
        self.begin(request)
        self.bound.run(on_call)


@dataclass(frozen=True)
class Plan:
    """A task with a schedule, for one batch and size.

    Attributes:
        inputs: What the host fills, in the order of the draws.
        buffers: Every tensor by name.
        prologue: Engine calls before the steps.
        steps: The sampling loop.
        epilogue: Engine calls after it.
    """

    inputs: tuple[TensorSpec, ...]
    buffers: Mapping[str, Buffer]
    prologue: BoundCalls
    steps: tuple[BoundStep, ...]
    epilogue: BoundCalls

    def run(self, request: Request, on_step: OnStep | None = None, on_call: OnCall | None = None) -> None:
        """Fills the inputs and runs everything; results are in ``buffers``.

        Args:
            request: What to draw.
            on_step: Told about progress.
            on_call: Told the time of every engine call.

        Raises:
            InputError: The request lacks an input.
            TargetError: An engine failed.
        """
        self.begin(request, on_call)
        for index, step in enumerate(self.steps):
            step.run(request, on_call)
            if on_step is not None:
                step.bound.wait()
                on_step(index + 1, len(self.steps))
        self.epilogue.run(on_call)

    def begin(self, request: Request, on_call: OnCall | None = None) -> None:
        """Fills the inputs and runs the prologue: what `run` does before the first step."""
        self.fill(request)
        self.prologue.run(on_call)

    def fill(self, request: Request) -> None:
        """Fills the inputs."""
        for spec in self.inputs:
            self.buffers[spec.name][...] = make_input(spec, request)

    def clear(self) -> None:
        """Zeros, as in a new plan: the sampler sums over the whole state, and no weight of zero hides a NaN."""
        for buffer in self.buffers.values():
            buffer[...] = 0


def make_plan(
    contents: Contents,
    task: Task,
    schedule: Schedule,
    symbols: Mapping[str, int],
    session: Callable[[str, Mapping[str, Buffer]], Session],
    backend: Backend,
    tile: int | None = None,
) -> Plan:
    """Allocates and binds all buffers of a task.

    Args:
        contents: The bundle's.
        task: What to do.
        schedule: One of the task's.
        symbols: "batch", "rows", "width", "height" and `TEXT`.
        session: Gives the loaded engine of a segment for what it will read.
        backend: Whose engines they are: buffers lie in its memory.
        tile: What makes the pictures is run on tiles of so many pixels along a side; None for the whole.

    Raises:
        BundleError: The calls do not fit together.
        InputError: A graph has a fixed batch that is not this one, or no such tile can be cut.
    """
    steps = schedule.steps
    calls = [call for step in steps for call in step.calls]
    prologue = needed([*task.prologue, *schedule.prologue], [*calls, *contents.epilogue])
    read = {name for call in (*prologue, *calls) for name in call.inputs.values()}
    inputs = tuple(spec for spec in task.inputs if spec.source.get("always") or reads(read, spec.name))
    table = _Buffers(contents.slots, backend)
    constants = Constants(contents, steps, backend)
    pictures = {spec.name for spec in contents.outputs}
    for spec in inputs:
        table.make(spec.name, shape(spec.shape, symbols), spec.dtype)
    whole = once(contents, prologue, schedule.constants, backend)

    def read_by(call: Call, spec: TensorSpec, fixed: Mapping[str, tuple[float, ...]]) -> Buffer:
        name = call.inputs[spec.name]
        if name in fixed:
            return constants.buffer(name, spec, fixed[name])
        return whole[name] if name in whole else table.get(name, call)

    def bound(call: Call, fixed: Mapping[str, tuple[float, ...]] = {}) -> BoundCall:
        segment = contents.segments[call.segment]
        arrays = {spec.name: read_by(call, spec, fixed) for spec in segment.inputs}
        results = _outputs(segment, call, arrays, table, symbols)
        if tile is not None and pictures & set(call.outputs.values()):
            run = bind_tiled(segment, arrays, results, tile, session, backend)
        else:
            run = session(call.segment, arrays).bind(arrays, results)
        return BoundCall(call.segment, run, arrays, results)

    def together(calls: Iterable[BoundCall], fuse: Callable[[Sequence[Run]], Run] = in_turn) -> BoundCalls:
        calls = tuple(calls)
        return BoundCalls(calls, fuse([call.run for call in calls]), backend.synchronize)

    _make_noise(table, task, steps, read, symbols)
    first = together(bound(call) for call in prologue)
    shared: dict[str, BoundCalls] = {}
    bound_steps = []
    for step, row in zip(steps, constants.rows, strict=True):
        # Steps differ in their constants alone, as a rule: what else they have in common is bound once.
        key = repr((step.calls, [(name, len(step.constants[name])) for name in sorted(step.constants)]))
        if key not in shared:
            again = (bound(call, step.constants) for call in step.calls)
            shared[key] = together(again, backend.fused)
        draws = tuple(table.get(name) for name in step.draws)
        results = {name: buffer for call in shared[key].calls for name, buffer in call.outputs.items()}
        bound_steps.append(BoundStep(draws, row, constants.place, shared[key], results))
    last = together(bound(call) for call in contents.epilogue)
    for spec in contents.outputs:
        if not table.get(spec.name).ndim:
            raise BundleError(f"the picture {spec.name} is one number: compile again")
    return Plan(inputs, table.buffers, first, tuple(bound_steps), last)


def _make_noise(
    table: _Buffers, task: Task, steps: Sequence[Step], read: set[str], symbols: Mapping[str, int]
) -> None:
    """Buffers for what steps draw, like the noise that the task starts from."""
    draw = next(
        (spec for spec in task.inputs if spec.source.get("kind") == "noise" and "batch" in spec.shape), None
    )
    for name in {name for step in steps for name in step.draws}:
        if draw is None:
            raise BundleError(
                f"a step draws the noise {name!r}, and the task starts from none: compile again"
            )
        table.make(name, shape(draw.shape, symbols), draw.dtype)
    if draw is not None and reads(read, "noise"):
        # Schedules without noise share their graph with those that have it: theirs has the weight 0.
        table.make("noise", shape(draw.shape, symbols), draw.dtype)


class _Buffers:
    """Buffers by name; ``name[k]`` is a slice of ``name``."""

    def __init__(self, slots: int, backend: Backend) -> None:
        self.buffers: dict[str, Buffer] = {}
        self._slots = slots
        self._backend = backend

    def make(self, name: str, sizes: tuple[int, ...], dtype: str) -> Buffer:
        """The buffer of this name, new unless it is there.

        Raises:
            BundleError: It is there with another shape or dtype.
        """
        if name not in self.buffers:
            if match := SLICE.match(name):
                # What is written slice by slice is the state: it has as many as the bundle says.
                self.make(match[1], (self._slots, *sizes), dtype)
                self.buffers[name] = self._slice(match)
            else:
                self.buffers[name] = self._backend.new(sizes, dtype)
        buffer = self.buffers[name]
        if buffer.shape != sizes or buffer.dtype != np.dtype(dtype):
            raise BundleError(
                f"the tensor {name} is {buffer.dtype} {buffer.shape} and {dtype} {sizes} is written to it: "
                "compile again"
            )
        return buffer

    def get(self, name: str, reader: Call | None = None) -> Buffer:
        """A buffer that something fills; a slice of one is a view.

        Raises:
            BundleError: Nothing does.
        """
        match = SLICE.match(name)
        if match and name not in self.buffers and match[1] in self.buffers:
            self.buffers[name] = self._slice(match)
        if name not in self.buffers:
            where = f" by {reader.segment}" if reader else ""
            raise BundleError(f"the tensor {name} is read{where} before anything wrote it: compile again")
        return self.buffers[name]

    def _slice(self, match: re.Match[str]) -> Buffer:
        whole = self.buffers[match[1]]
        if whole.ndim == 0 or int(match[2]) >= len(whole):
            raise BundleError(f"{match[0]} is used and {match[1]} is {whole.shape}: compile again")
        # With the dots a slice of a vector is a view of no axes; without them it would be a copy of a number.
        view: Buffer = whole[int(match[2]), ...]
        return view


def _outputs(
    segment: SegmentEntry,
    call: Call,
    arrays: Mapping[str, Buffer],
    table: _Buffers,
    symbols: Mapping[str, int],
) -> dict[str, Buffer]:
    """Buffers for a call's results, of the shapes that follow from its inputs."""
    sizes: dict[str, int] = {}
    for spec in segment.inputs:
        array = arrays[spec.name]
        problem = bind(spec.shape, array.shape, sizes)
        if problem is None and array.dtype != np.dtype(spec.dtype):
            problem = f"{array.dtype}, {spec.dtype} needed"
        if problem is not None:
            _check_batch(segment, spec, array.shape, symbols)
            raise BundleError(f"{segment.name} is given {call.inputs[spec.name]} as {spec.name}: {problem}")
    return {
        spec.name: table.make(call.outputs[spec.name], shape(spec.shape, sizes), spec.dtype)
        for spec in segment.outputs
    }


def _check_batch(
    segment: SegmentEntry, spec: TensorSpec, actual: tuple[int, ...], symbols: Mapping[str, int]
) -> None:
    """Raises InputError where the graph has a fixed batch and another number of pictures was asked for."""
    axis = 1 if spec.name == STATE else 0
    batch, rows = symbols["batch"], symbols["rows"]
    fixed = spec.shape[axis] if len(spec.shape) == len(actual) > axis else None
    if not isinstance(fixed, int) or actual[axis] not in (batch, rows * batch) or fixed == actual[axis]:
        return
    each = 2 if rows == 2 and actual[axis] == rows * batch else 1
    asked = "1 picture" if batch == 1 else f"{batch} pictures"
    guided = " with guidance, 2 rows each," if each == 2 else ""
    fits = fixed // each if fixed % each == 0 else None
    advice = f"ask for {fits} at a time" if fits else "turn guidance off"
    raise InputError(
        f"{asked}{guided} asked for, and the graph {segment.name} was exported "
        f"for a fixed batch of {fixed}: {advice}, or export it with an open batch"
    )
