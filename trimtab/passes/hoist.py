"""What depends on the time and the conditions alone, computed for all steps at once before the first.

A transformer scales and shifts every block by numbers that come of the time step and the class, or a pooled text:
not of the picture. DiT has a third of its weights there, Stable Diffusion 3 and Flux about as many, and every step
reads them for one or two rows. Rows of a denoiser know nothing of each other, so steps can be rows:

    before the steps   Call("denoiser.conditions", {"timestep": all time steps, ...}, {v: "conditions_0"})
    step k             Call("denoiser", inputs | {v: "conditions_0[k]"}, outputs)

The weights are read, or decoded, once a picture and not once a step, and no step needs them. `partition` cuts the
graph.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from trimtab.errors import PassError
from trimtab.passes.all_steps import for_all_steps
from trimtab.passes.calls import denoisers, whole_loops
from trimtab.passes.context import CONTEXT
from trimtab.passes.known_products import LEAST_SHARE, KnownProducts
from trimtab.passes.time_tables import TABULATE
from trimtab.program import SLICE, Call, PassEntry, Program, Schedule, Segment, Step, Task, loop_of

logger = logging.getLogger(__name__)


def hoist(program: Program) -> Program:
    """Moves products of the time and the conditions out of the loop, with all that only they need.

    Exact: the same operators run on the same rows; a product of more rows may add up in another order (1e-6).

    A denoiser is left as it is where such products hold less than `LEAST_SHARE` of its weights, or where its graph is
    not one that takes a time step for each row. A warning says so, unless something else was taken out of the steps.

    Args:
        program: Not cut yet (`trimtab.passes.partition`). Its graphs stay as they are.

    Returns:
        A program with a segment ``NAME.conditions`` for a denoiser ``NAME``, whose calls read its results; there they
        are (steps, rows, channels), and every step reads its own.
    """
    entries: list[PassEntry] = []
    segments = dict(program.segments)
    tasks = dict(program.tasks)
    tensors = 0
    eased = {entry.segment for entry in program.passes if entry.name in (TABULATE, CONTEXT) and entry.applied}
    for name in denoisers(program):
        try:
            found = _find(program, name)
            for_all_steps(found.part, found.time)
        except PassError as reason:
            level = logging.INFO if name in eased else logging.WARNING
            logger.log(level, "%s: nothing is computed before the steps: %s", name, reason)
            entries.append(PassEntry("Hoist", name, 0, 1))
            continue
        names = {value: f"conditions_{tensors + index}" for index, value in enumerate(found.values)}
        tensors += len(names)
        moved = _Moved(found, f"{name}.conditions", names, f"times_{len(entries)}")
        segments[moved.segment] = Segment(moved.segment, found.part)
        loops = whole_loops(tasks.values())
        tasks = {key: moved.out_of(task, loops) for key, task in tasks.items()}
        entries.append(PassEntry("Hoist", name, len(names), 0))
    return dataclasses.replace(program, segments=segments, tasks=tasks, passes=(*program.passes, *entries))


@dataclass(frozen=True)
class _Found:
    """What can be moved out of a graph.

    Attributes:
        segment: The denoiser's name.
        time: The input that is another in every step.
        values: Names of what is computed before.
        part: The segment that computes them.
    """

    segment: str
    time: str
    values: tuple[str, ...]
    part: ir.Model


def _find(program: Program, name: str) -> _Found:
    """Raises PassError where nothing is worth it, and as `build_segment` does."""
    known = KnownProducts.of(program, name)
    share = known.share(known.timed)
    if share < LEAST_SHARE:
        raise PassError(f"what reads the time, and not the picture, holds {share:.1%} of its weights")
    part = known.segment(f"{name}.conditions", known.timed)
    times = [str(value.name) for value in part.graph.inputs if value.name in known.times]
    if len(times) != 1:
        raise PassError(f"{', '.join(times)} change from step to step, and one input that does is needed")
    return _Found(name, times[0], tuple(str(node.outputs[0].name) for node in known.timed), part)


# ---- the calls ----


@dataclass(frozen=True)
class _Moved:
    """A segment that is called before the steps.

    Attributes:
        found: What it was made of.
        segment: Its name.
        names: Value -> the tensor that holds it for all steps.
        times: The tensor of the time steps, where they are constants.
    """

    found: _Found
    segment: str
    names: Mapping[str, str]
    times: str

    def out_of(self, task: Task, loops: Mapping[str, Schedule]) -> Task:
        """The task with the segment called once for each of its schedules; loops are from `whole_loops`."""
        schedules = {
            name: self._called(schedule, loops[loop_of(name)]) for name, schedule in task.schedules.items()
        }
        return dataclasses.replace(task, schedules=schedules)

    def _called(self, schedule: Schedule, whole: Schedule) -> Schedule:
        """A schedule with it.

        Args:
            schedule: One of a task's.
            whole: The same from its first step on: its times are computed, so that an engine for them serves both.
        """
        calls = self._calls(schedule)
        if not calls:
            return schedule
        constants = dict(schedule.constants)
        if row := SLICE.match(calls[0][1].inputs[self.found.time]):
            times = row[1]
        else:
            times = self.times
            constants[times] = self._times(whole)
            if not set(self._times(schedule)) <= set(constants[times]):
                constants[times] = self._times(schedule)
        given = {
            value: tensor
            for value, tensor in calls[0][1].inputs.items()
            if value in {v.name for v in self.found.part.graph.inputs}
        }
        first = Call(self.segment, given | {self.found.time: times}, self.names)
        steps = tuple(self._reading(step, constants.get(times, ())) for step in schedule.steps)
        return dataclasses.replace(
            schedule, steps=steps, prologue=(*schedule.prologue, first), constants=constants
        )

    def _calls(self, schedule: Schedule) -> list[tuple[Step, Call]]:
        return [
            (step, call)
            for step in schedule.steps
            for call in step.calls
            if call.segment == self.found.segment
        ]

    def _times(self, schedule: Schedule) -> tuple[float, ...]:
        """The time steps of a schedule whose are constants, each once."""
        read = ((step, call.inputs[self.found.time]) for step, call in self._calls(schedule))
        return tuple(dict.fromkeys(step.constants[name][0] for step, name in read if name in step.constants))

    def _reading(self, step: Step, times: Sequence[float]) -> Step:
        """A step that reads its own of what was computed."""

        def read(call: Call) -> Call:
            if call.segment != self.found.segment:
                return call
            time = call.inputs[self.found.time]
            row = SLICE.match(time)
            index = int(row[2]) if row else times.index(step.constants[time][0])
            given = {value: f"{tensor}[{index}]" for value, tensor in self.names.items()}
            return dataclasses.replace(call, inputs={**call.inputs, **given})

        return dataclasses.replace(step, calls=tuple(map(read, step.calls)))
