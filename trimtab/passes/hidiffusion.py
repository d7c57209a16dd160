"""Pictures larger than a U-Net was trained for: HiDiffusion (https://arxiv.org/abs/2311.17528).

RAU-Net shows the deep blocks feature maps of the size that they know, for the first part of the steps, in which
the picture is laid out; MSW-MSA gives the outermost self-attention windows, at all steps. Nothing is trained. Both
are in one graph (`trimtab.passes.raunet`), and the schedules say which step reads which values and how many windows
there are: so every weight stands once, and the deep blocks run at either size.

Where and when is what the authors' repository says (https://github.com/megvii-research/HiDiffusion).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from trimtab.errors import PassError
from trimtab.passes.calls import whole_loops
from trimtab.passes.raunet import CONV, POOL, SHIFT, WINDOWS, Places, Swaps, add_alternatives, find_places
from trimtab.passes.window_attention import SHIFTS
from trimtab.program import DENOISER, Call, PassEntry, Program, Schedule, Step, TensorSpec, loop_of

SCALES = (2, 4)
"""How many times the trained side there are phases for."""

WINDOWS_PER_SIDE = 2
"""Windows of MSW-MSA along each side of a large picture."""

Phases = tuple[tuple[Fraction, tuple[str, ...]], ...]
"""Stretches of steps: the share of the steps at which each ends, and what is rewritten in it; plain ones follow."""

_AT_TOP: Mapping[int, Phases] = {
    2: ((Fraction(40, 100), (CONV,)),),
    4: ((Fraction(30, 100), (CONV, POOL)), (Fraction(70, 100), (CONV,))),
}
_BELOW: Mapping[int, Phases] = {
    2: ((Fraction(8, 50), (CONV,)), (Fraction(40, 100), (POOL,))),
    4: ((Fraction(30, 100), (CONV, POOL)), (Fraction(70, 100), (POOL,))),
}


def rewrites_at(places: Places, scale: int, step: int, steps: int) -> tuple[str, ...]:
    """What step ``step`` of ``steps`` reads at a scale. Thresholds are cut off to whole steps, as in the repository.

    Args:
        places: SDXL's, whose windows lie one level down, has phases of its own.
        scale: Of `SCALES`.
        step: From 0.
        steps: Of the whole loop.
    """
    for until, rewrites in (_BELOW if places.window_level else _AT_TOP)[scale]:
        if step < math.floor(until * steps):
            return rewrites
    return ()


def check_places(program: Program) -> None:
    """Refuses denoisers that `hidiffusion` does not cover by the names of their modules, before long work.

    Raises:
        PassError: A denoiser is no U-Net of enough levels, or its windows cannot divide the native size.
    """
    _size_multiple(program, _found(program).values())


def hidiffusion(program: Program) -> Program:
    """Adds schedules for pictures of two and of four times the trained side to a U-Net's Program.

    ``NAME/2x`` and ``NAME/4x`` stand beside each schedule; where the Program's own size is of such a scale already,
    that scale's stand in the place of the plain ones. The shifts of the windows are an input that is drawn from the
    seed, apart from the noise.

    Args:
        program: Its denoisers' graphs gain alternatives in place; every plain value stays what it is.
            `trimtab.passes.partition.partition` must follow.

    Raises:
        PassError: A denoiser is no U-Net that the method covers, or its windows cannot divide the native size.
    """
    found = _found(program)
    multiple = _size_multiple(program, found.values())
    trained = program.trained_size or program.size
    native = scale_of(program.size, trained)
    rewrites = {
        name: _Rewrites(
            f"{SHIFT}s{number or ''}", places, *add_alternatives(program.segments[name].model, places)
        )
        for number, (name, places) in enumerate(found.items())
    }
    evaluations = {name: len(loop.steps) for name, loop in whole_loops(program.tasks.values()).items()}

    def at_scale(name: str, schedule: Schedule, scale: int) -> Schedule:
        return dataclasses.replace(
            schedule,
            steps=_rewritten(schedule.steps, evaluations[loop_of(name)], scale, rewrites),
            least_pixels=_least_pixels(scale, trained) if native == 1 else 0,
            size_multiple=multiple,
        )

    tasks = {}
    for key, task in program.tasks.items():
        schedules = {}
        for name, schedule in task.schedules.items():
            if native > 1:
                schedules[name] = at_scale(name, schedule, native)
                continue
            schedules[name] = schedule
            schedules |= {f"{name}/{scale}x": at_scale(name, schedule, scale) for scale in SCALES}
        drawn = tuple(
            TensorSpec(
                each.shifts,
                "int64",
                (max(evaluations.values()), each.blocks),
                {"kind": "window_shifts", "shifts": SHIFTS},
            )
            for each in rewrites.values()
        )
        tasks[key] = dataclasses.replace(
            task, inputs=(*task.inputs, *drawn), schedules=_windowed(schedules, native, rewrites)
        )
    entries = [
        PassEntry("HiDiffusion", name, each.blocks + len(each.swaps), 0) for name, each in rewrites.items()
    ]
    return dataclasses.replace(program, tasks=tasks, passes=(*program.passes, *entries))


def _found(program: Program) -> dict[str, Places]:
    return {
        name: find_places(segment.model)
        for name, segment in program.segments.items()
        if name.startswith(DENOISER)
    }


def _size_multiple(program: Program, found: Iterable[Places]) -> int:
    """What the sides of a larger picture must be multiples of.

    Raises:
        PassError: The native size is such a picture's, and they are none.
    """
    # Windows cut an even side in two; where they lie in the pooled part, its half must be even too.
    halvings, places = max(
        ((each.window_level + 1 + each.windows_are_pooled, each) for each in found),
        key=lambda pair: pair[0],
    )
    multiple = program.size_multiple << halvings
    native = scale_of(program.size, program.trained_size or program.size)
    if native > 1 and any(side % multiple for side in program.size):
        width, height = program.size
        raise PassError(
            f"the windows of {places.windows[0]} cannot divide {width}x{height}: both sides must be multiples of "
            f"{multiple} with HiDiffusion"
        )
    return multiple


@dataclass(frozen=True)
class _Rewrites:
    """What one denoiser's graph has gained; ``shifts`` is the tensor of its windows' shifts, a row for every step."""

    shifts: str
    places: Places
    swaps: Swaps
    blocks: int


def scale_of(size: tuple[int, int], trained: tuple[int, int]) -> int:
    """1, 2 or 4: how many times the trained side a picture is, by its area, to the nearest power of two."""
    return max((scale for scale in SCALES if size[0] * size[1] >= _least_pixels(scale, trained)), default=1)


def _least_pixels(scale: int, trained: tuple[int, int]) -> int:
    """The area at which a scale is the nearest one, in whole numbers: 512x1024 lies right there."""
    return -(-trained[0] * trained[1] * scale * scale // 2)


def _windowed(
    schedules: Mapping[str, Schedule], native: int, rewrites: Mapping[str, _Rewrites]
) -> dict[str, Schedule]:
    """Every call of a denoiser reads its step's shifts, and how many windows there are at its scale."""

    def windowed(step: Step, index: int, windows: int) -> Step:
        calls = (
            dataclasses.replace(
                call, inputs={**call.inputs, WINDOWS: WINDOWS, SHIFT: f"{ours.shifts}[{index}]"}
            )
            if (ours := rewrites.get(call.segment))
            else call
            for call in step.calls
        )
        return dataclasses.replace(
            step, calls=tuple(calls), constants={**step.constants, WINDOWS: (0.0,) * windows}
        )

    return {
        name: dataclasses.replace(
            schedule,
            steps=tuple(
                windowed(step, index, WINDOWS_PER_SIDE if native > 1 or schedule.least_pixels else 1)
                for index, step in enumerate(schedule.steps)
            ),
        )
        for name, schedule in schedules.items()
    }


def _rewritten(
    steps: Sequence[Step], whole: int, scale: int, rewrites: Mapping[str, _Rewrites]
) -> tuple[Step, ...]:
    """Steps that read what their phase says; a loop that starts late, for a picture, starts late in the phases."""

    def swapped(call: Call, index: int) -> Call:
        if call.segment not in rewrites:
            return call
        ours = rewrites[call.segment]
        swaps = {
            value: f"{call.segment}/{other}"
            for name in rewrites_at(ours.places, scale, index, whole)
            for value, other in ours.swaps[name].items()
        }
        others = {tensor.partition("/")[2]: tensor for tensor in swaps.values()}
        return dataclasses.replace(call, inputs={**call.inputs, **swaps}, outputs={**call.outputs, **others})

    return tuple(
        dataclasses.replace(step, calls=tuple(swapped(call, index) for call in step.calls))
        for index, step in enumerate(steps, whole - len(steps))
    )
