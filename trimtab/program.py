"""The Program: a whole sampling pipeline as static data, with no code in it.

Calls and steps are plain data and import no onnx: the runtime reads them from a bundle as they are. Only
`Segment` holds a graph, and only while compiling.

A tensor is a name. Whatever writes the name and whatever reads it share one buffer, so a tensor that lives
from one step to the next is just a name that a later call reads. ``name[k]`` is the k-th slice of the tensor
``name`` along its first axis: the sampler's state is one tensor whose slots are written one at a time and read
together; a table of what depends on the picture's size is written whole, and every step reads its row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trimtab.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

PRECISION = "trimtab.precision"
"""On a model that computes in a half precision: which."""

Dim = int | str
"""A size, or an expression over symbols such as ``"rows*batch"`` or ``"height//8"`` (see `trimtab.shapes`)."""

DENOISER = "denoiser"
"""The segment that runs in every step; what the names of its parts and versions begin with."""

SHIFT = "shift"
"""The segment that makes the numbers of a schedule that follows the picture's size."""

STATE = "state"
"""The sampler's state: (slots, batch, *latent) float32. Slot 0 holds the start noise, slot 1 an image's latents."""

TEXT = "tokens"
"""The symbol for the number of tokens of a text whose padding nothing reads."""

SLICE = re.compile(r"^(\w+)\[(\d+)\]$")
"""The name of a slice: the whole tensor's, and which."""


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor that enters or leaves a program or a graph.

    Attributes:
        name: The name that calls use.
        dtype: A numpy dtype name ("float32", "int64", ...).
        shape: Sizes or expressions over "batch", "height", "width" (pixels), "rows" (1, or 2 with
            classifier-free guidance: row 0 is the negative one) and `TEXT`.
        source: Where the value comes from: a key of `trimtab.runtime.inputs.SOURCES` with its options,
            for instance ``{"kind": "tokens", "tokenizer": "tokenizer"}``. Empty for outputs.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    source: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """Run a segment.

    Attributes:
        segment: The segment's name.
        inputs: Graph input -> tensor name.
        outputs: Graph output -> tensor name.
    """

    segment: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Step:
    """One turn of the sampling loop: one evaluation of the denoiser.

    Attributes:
        calls: What runs, in order.
        constants: Tensor name -> its values in this step, float32 in the shape that the graphs ask for. What
            depends on the picture's size is no constant but a row of a table, ``name_table[k]``, that a call of
            the schedule's prologue writes.
        draws: Noise tensors that are drawn before the calls, in order. A name that no call reads is drawn
            all the same: the generator must advance as diffusers' does.
    """

    calls: tuple[Call, ...]
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    draws: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """The sampling loop at one number of steps.

    Attributes:
        steps: In the order in which they run.
        prologue: Calls that only this schedule needs before its first step, after the task's own.
        least_pixels: Of the schedules ``NAME``, ``NAME/2x``, ... the one with the largest of these areas that a
            picture reaches is walked.
        size_multiple: What both sides of a picture must be multiples of, in pixels.
        constants: Tensor name -> the values that calls of the prologue read, float32 as those of a step.
    """

    steps: tuple[Step, ...]
    prologue: tuple[Call, ...] = ()
    least_pixels: int = 0
    size_multiple: int = 1
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One thing that a program can be asked for: "text-to-image", "image-to-image", ...

    Attributes:
        inputs: What the host provides, in the order in which noise is drawn.
        prologue: Runs once before the steps.
        schedules: By name. An image-to-image schedule that starts at step k of ``dpm++-20``'s is named
            ``dpm++-20/from-k``.
        guidance: The default guidance scale, or None where the model has no guidance.
        strength: For tasks that start from a picture: the default share of the steps that run.
        strength_rounds_up: Whether steps * strength is rounded up to whole steps, or down.
        strength_steps: What it is a share of, where that is not the schedule's steps: those that an LCM was distilled
            from, of which ``lcm-4/from-10`` leaves out ten and walks the others in its four.
    """

    inputs: tuple[TensorSpec, ...]
    prologue: tuple[Call, ...]
    schedules: Mapping[str, Schedule]
    guidance: float | None = None
    strength: float | None = None
    strength_rounds_up: bool = False
    strength_steps: int | None = None


TASKS = ("text-to-image", "class-to-image", "unconditional", "image-to-image", "inpainting", "editing")
"""Names of tasks. Editing changes a picture by a text, and looks at it for that all along."""


@dataclass(frozen=True)
class Segment:
    """One ONNX graph; becomes one engine.

    The graph's inputs and outputs are the interface: names, dtypes and symbolic shapes. The symbols of a
    segment are its own; the runtime binds them from the inputs and resolves the outputs' expressions.
    """

    name: str
    model: ir.Model

    @property
    def precision(self) -> str:
        """What it computes in: "fp32", "fp16" or "bf16"."""
        return self.model.metadata_props.get(PRECISION, "fp32")


@dataclass(frozen=True)
class PassEntry:
    """What a pass did.

    Attributes:
        name: The pass.
        segment: Where it ran.
        applied: How many places it rewrote.
        refused: How many it left alone.
    """

    name: str
    segment: str
    applied: int
    refused: int


@dataclass(frozen=True)
class Program:
    """A whole pipeline.

    Attributes:
        segments: Name -> graph.
        tasks: Task name -> inputs, prologue and schedules; the first is the default.
        epilogue: Latents -> image.
        outputs: What the program gives.
        size: Native (width, height) in pixels.
        trained_size: What the model itself says of its size, where the user chose another as the native one.
        size_multiple: What both must be multiples of.
        fixed_size: Why no other size can be drawn, or None.
        largest_side: What no side of a picture can exceed, in pixels; None where nothing in the model ends.
        slots: First axis of the tensor `STATE`.
        tokenizers: Name -> contents of a ``tokenizer.json``.
        metadata: Free text for reports: pipeline class, scheduler.
        passes: What was done to the graphs, in order.
    """

    segments: Mapping[str, Segment]
    tasks: Mapping[str, Task]
    epilogue: tuple[Call, ...]
    outputs: tuple[TensorSpec, ...]
    size: tuple[int, int]
    size_multiple: int
    fixed_size: str | None
    slots: int
    trained_size: tuple[int, int] | None = None
    largest_side: int | None = None
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    passes: tuple[PassEntry, ...] = ()


def needed(prologue: Sequence[Call], later: Sequence[Call]) -> tuple[Call, ...]:
    """The calls of a prologue whose results something reads: a later call of it, or one behind it."""
    read = {name for call in later for name in call.inputs.values()}
    kept: list[Call] = []
    for call in reversed(prologue):
        if any(reads(read, name) for name in call.outputs.values()):
            kept.append(call)
            read.update(call.inputs.values())
    return tuple(reversed(kept))


def reads(read: set[str], name: str) -> bool:
    """Whether a tensor is among those read: itself, the whole that it is a slice of, or a slice of it."""
    match = SLICE.match(name)
    if name in read or (match is not None and match[1] in read):
        return True
    return any(name == part[1] for part in map(SLICE.match, read) if part is not None)


def loop_of(schedule: str) -> str:
    """A schedule's name without its start: ``heun-20/from-8/2x`` is a part of ``heun-20/2x``."""
    return re.sub(r"/from-\d+", "", schedule)


def first_step(steps: int, strength: float, rounds_up: bool) -> int:
    """The step that a loop begins at which starts from a picture: ``t_start`` of diffusers' pipelines, to the last bit.

    Args:
        steps: Of the whole loop.
        strength: The share of them that runs, above 0 and at most 1.
        rounds_up: Whether that is rounded up to whole steps, or down: then ``steps`` comes back where none is left.
    """
    return int(steps - steps * strength) if rounds_up else steps - int(steps * strength)


def check_guidance(scale: float | None, has_guidance: bool) -> None:
    """Raises InputError for a scale where a model, or a task, has no guidance.

    Cards of such models give 0: none is asked for, as by 1.
    """
    if scale is not None and not scale <= 1 and not has_guidance:  # NaN neither
        raise InputError(
            f"a guidance scale of {scale:g} was given and this model has no guidance: leave it out"
        )


def with_guidance(program: Program, scale: float) -> Program:
    """A program whose tasks are guided by a scale where none is asked for.

    Raises:
        InputError: The model has no guidance, and a scale above 1 is given.
    """
    check_guidance(scale, any(task.guidance is not None for task in program.tasks.values()))
    tasks = {
        name: task if task.guidance is None else replace(task, guidance=scale)
        for name, task in program.tasks.items()
    }
    return replace(program, tasks=tasks)


def check_size(
    size: tuple[int, int],
    native: tuple[int, int],
    multiple: int,
    fixed: str | None,
    largest: int | None = None,
) -> None:
    """Raises InputError for a size that the model cannot draw. See `Program` for the arguments."""
    width, height = size
    if fixed and size != native:
        raise InputError(
            f"{width}x{height} was asked for and only {native[0]}x{native[1]} can be drawn: {fixed}"
        )
    if width < multiple or height < multiple or width % multiple or height % multiple:
        most = float("inf") if largest is None else largest
        near = tuple(min(most, max(multiple, round(side / multiple) * multiple)) for side in size)
        raise InputError(
            f"{width}x{height} was asked for and both sides must be multiples of {multiple}: "
            f"use {near[0]}x{near[1]}"
        )
    if largest is not None and max(size) > largest:
        raise InputError(
            f"{width}x{height} was asked for and the model's table of positions ends at {largest} pixels a side: "
            f"use {min(width, largest)}x{min(height, largest)} or smaller"
        )
