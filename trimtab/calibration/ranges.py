"""How large the numbers in a model get: the maximum magnitude of every tensor, on the model's own trajectories.

FP16 ends at 65504. Which tensors come near it is a property of the trained weights, and is measured and not guessed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trimtab.calibration.draft import draft, with_whole_texts
from trimtab.calibration.trajectories import own_requests
from trimtab.errors import CalibrationError, InputError
from trimtab.passes.calls import whole_loops
from trimtab.passes.constants import shared_constant
from trimtab.passes.operators import FLOAT, MOVES
from trimtab.passes.precision import SCORES
from trimtab.passes.sampler import SCOPE as SAMPLER
from trimtab.passes.scopes import scopes
from trimtab.program import Call, Program, Schedule, Segment, Task
from trimtab.runtime.arguments import possible_strengths
from trimtab.runtime.load import Pipeline
from trimtab.staging import write_file
from trimtab.targets.key import graph_digest

logger = logging.getLogger(__name__)

FILE = "calibration/ranges.json"
"""Where a bundle keeps them."""

EVALUATIONS, PICTURES = 20, 4
"""Steps that are measured, in whole trajectories, and the most of those.

The margin of `trimtab.passes.precision`, 16, covers what others would add: on the sample models one picture of 20
steps misses a factor of 10 of one tensor at most, two pictures one of 9.
"""

_OUTPUT = "measured_ranges"
_AT_MOST_ONE = frozenset(("Sigmoid", "Tanh", "Softmax", "Sin", "Cos", "Erf", "HardSigmoid"))


@dataclass(frozen=True)
class Ranges:
    """What was measured.

    Attributes:
        fingerprint: Of the program: its graphs and their weights.
        segments: Segment -> tensor -> the largest magnitude that was seen. Tensors that are moved from others are
            not listed, nor those of operators that give at most 1. Segments that nothing called are missing.
    """

    fingerprint: str
    segments: Mapping[str, Mapping[str, float]]

    def save(self, path: Path) -> None:
        """Writes a JSON file, whole or not at all."""
        write_file(path, json.dumps(vars(self), indent=0, allow_nan=False).encode())


def load_ranges(path: Path) -> Ranges:
    """Reads what `Ranges.save` wrote.

    Raises:
        InputError: No such file, or another one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        segments = {
            str(segment): {str(name): float(value) for name, value in measured.items()}
            for segment, measured in data["segments"].items()
        }
        if not all(0 <= value < math.inf for measured in segments.values() for value in measured.values()):
            raise ValueError("a magnitude below 0")
        return Ranges(str(data["fingerprint"]), segments)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no ranges ({error}): measure them again") from None


def fingerprint(program: Program) -> str:
    """SHA-256 over all graphs and weights of a program, in hexadecimal."""
    parts = {name: graph_digest(segment.model) for name, segment in program.segments.items()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def measure_ranges(
    program: Program,
    folder: Path,
    *,
    requests: Sequence[dict[str, Any]] | None = None,
    earlier: Path | None = None,
    progress: Callable[[str], None] = logger.info,
) -> Ranges:
    """Draws pictures on ONNX Runtime, and keeps the maximum of every tensor over all steps.

    The reduction is part of the graphs, so that no tensor outlives its readers: memory is that of a normal run.
    Every call of the first task is measured, and the encoder of its pictures where they can be started from.

    Args:
        program: As it will be converted; stays as it was.
        folder: Where its draft is written (see `trimtab.calibration.draft.draft`).
        requests: Arguments of `Pipeline.prepare`; None for `EVALUATIONS` on the longest schedule of as many
            steps at most, or else on the shortest.
        earlier: A file of `Ranges.save`, taken in place of a measurement if it is of the same program.
        progress: Told every step.

    Raises:
        CalibrationError: The model gives numbers that are not finite.
    """
    mark = fingerprint(program)
    if earlier is not None and earlier.is_file():
        try:
            known = load_ranges(earlier)
        except InputError as error:
            logger.warning("%s", error)
        else:
            if known.fingerprint == mark:
                return known
    watched, names = _watched(program)
    found = {segment: np.zeros(len(tensors)) for segment, tensors in names.items()}
    called: set[str] = set()
    with draft(with_whole_texts(watched), folder) as pipeline:
        for options in _requests(pipeline) if requests is None else requests:
            _draw(pipeline, options, found, called, progress)
    segments = {
        segment: dict(zip(tensors, map(float, found[segment]), strict=True))
        for segment, tensors in names.items()
        if segment in called
    }
    return Ranges(mark, segments)


def _requests(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Whole trajectories of `EVALUATIONS`, and one of every shorter schedule that calls what they do not."""
    task = pipeline.bundle.contents.tasks[pipeline.tasks[0]]
    plain = {name: loop for name, loop in whole_loops([task]).items() if "/" not in name}
    # A schedule of one step sees the first time step alone, where a model is asked for noise.
    rising = sorted(plain, key=lambda name: len(plain[name].steps))
    fitting = [name for name in rising if len(plain[name].steps) <= EVALUATIONS]
    chosen = fitting[-1] if fitting else rising[0]
    pictures = math.ceil(EVALUATIONS / max(1, len(plain[chosen].steps)))
    requests = own_requests(pipeline, min(pictures, PICTURES), schedule=chosen)
    called = _called(plain[chosen])
    for name in fitting:
        if not _called(plain[name]) <= called:
            requests += own_requests(pipeline, 1, schedule=name)
            called |= _called(plain[name])
    return requests


def _called(schedule: Schedule) -> set[str]:
    calls = (schedule.prologue, *(step.calls for step in schedule.steps))
    return {call.segment for some in calls for call in some}


def _draw(
    pipeline: Pipeline,
    options: dict[str, Any],
    found: dict[str, Any],
    called: set[str],
    progress: Callable[[str], None],
) -> None:
    request, plan, _ = pipeline.prepare(**options)

    def on_call(segment: str, _: float) -> None:
        if segment in found:
            # A filled mask may be infinite, and JSON has no infinity.
            limit = float(np.finfo(np.float32).max)
            measured = np.minimum(plan.buffers[_buffer(segment)], limit)
            np.maximum(found[segment], measured, out=found[segment])  # a NaN stays
            called.add(segment)

    plan.run(request, lambda done, total: progress(f"measuring ranges: step {done} of {total}"), on_call)
    pixels = plan.buffers[pipeline.bundle.contents.outputs[0].name].copy()
    for segment, values in found.items():
        if not np.isfinite(values).all():
            raise CalibrationError(
                f"{segment} gives numbers that are not finite in float32: mend its weights"
            )
    if "image-to-image" in pipeline.tasks and "image" not in options:
        options = {name: value for name, value in options.items() if name != "schedule"}
        strength = _strength(pipeline.bundle.contents.tasks["image-to-image"], pipeline.schedules[0])
        request, plan, _ = pipeline.prepare(**options, image=np.clip(pixels[0], 0, 1), strength=strength)
        plan.begin(request, on_call)


def _strength(task: Task, schedule: str) -> float:
    """The one nearest to a task's own: of few steps that may leave none."""
    own = task.strength
    assert own is not None  # it starts from a picture
    return min(possible_strengths(task, schedule), key=lambda each: abs(each - own), default=own)


# ---- graphs that measure themselves ----


def _buffer(segment: str) -> str:
    return f"{segment}/{_OUTPUT}"


def _watched(program: Program) -> tuple[Program, dict[str, tuple[str, ...]]]:
    """A program whose graphs give the maxima of their tensors as one more output, and whose they are."""
    segments, names = {}, {}
    for name, segment in program.segments.items():
        model = segment.model.clone()
        tensors = _watch(model)
        segments[name] = Segment(name, model)
        if tensors:
            names[name] = tensors

    def call(old: Call) -> Call:
        more = {_OUTPUT: _buffer(old.segment)} if old.segment in names else {}
        return replace(old, outputs={**old.outputs, **more})

    def calls(old: tuple[Call, ...]) -> tuple[Call, ...]:
        return tuple(map(call, old))

    def schedule(old: Schedule) -> Schedule:
        steps = tuple(replace(step, calls=calls(step.calls)) for step in old.steps)
        return replace(old, steps=steps, prologue=calls(old.prologue))

    def task(old: Task) -> Task:
        schedules = {name: schedule(each) for name, each in old.schedules.items()}
        return replace(old, prologue=calls(old.prologue), schedules=schedules)

    tasks = {name: task(each) for name, each in program.tasks.items()}
    return replace(program, segments=segments, tasks=tasks, epilogue=calls(program.epilogue)), names


def _watch(model: ir.Model) -> tuple[str, ...]:
    """Adds the output to a graph, in place; gives the names of the tensors in its order.

    The last tensors are measured by the first of the new nodes: ONNX Runtime orders a graph by a search in depth from
    its last node, and of a node's inputs follows the latest in the list first. So each tensor is measured as soon as
    it is there; the other way round all of them would stay until the end.
    """
    graph = model.graph
    found: dict[str, ir.Value] = {}
    watch = _Watch(graph)
    for node in reversed(list(graph)):
        if SAMPLER in scopes(node):
            continue
        for value in node.outputs:
            if value.name and value.dtype == FLOAT and node.op_type not in MOVES | _AT_MOST_ONE:
                found[value.name] = watch.largest(value)
        value = node.outputs[0]
        if node.op_type == "Attention" and node.domain == "" and value.name:
            found[value.name + SCORES] = watch.scores(node)
    for value in graph.inputs:
        if (
            value.name
            and value.dtype == FLOAT
            and any(SAMPLER not in scopes(user) for user, _ in value.uses())
        ):
            found[value.name] = watch.largest(value)
    if found:
        graph.outputs.append(watch.gathered(list(found.values())))
    return tuple(found)


class _Watch:
    """Makes the nodes that measure."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.count = 0

    def largest(self, value: ir.Value) -> ir.Value:
        """The largest magnitude in a tensor, as a scalar: by two reductions, since Abs would be a tensor as large."""
        high = self._node("ReduceMax", value, keepdims=0)
        return self._node("Max", high, self._node("Neg", self._node("ReduceMin", value, keepdims=0)))

    def scores(self, node: ir.Node) -> ir.Value:
        """What no score of an attention exceeds, by Cauchy and Schwarz: the longest query times the longest key."""
        query, key = node.inputs[0], node.inputs[1]
        assert query is not None and key is not None
        longest = [
            self._node(
                "Sqrt",
                self._node("ReduceMax", self._node("ReduceSumSquare", v, axes, keepdims=0), keepdims=0),
            )
            for v, axes in ((query, self._last()), (key, self._last()))
        ]
        scale = node.attributes.get_float("scale", None) or 1 / math.sqrt(_head_size(node, query))
        return self._node(
            "Mul", self._node("Mul", *longest), self._constant("scale", np.array(scale, np.float32))
        )

    def gathered(self, scalars: list[ir.Value]) -> ir.Value:
        """All maxima as one vector."""
        one = self._constant("one", np.array([1], np.int64))
        whole = self._node("Concat", *(self._node("Reshape", scalar, one) for scalar in scalars), axis=0)
        whole.name, whole.shape = _OUTPUT, ir.Shape([len(scalars)])
        return whole

    def _last(self) -> ir.Value:
        return self._constant("last", np.array([-1], np.int64))

    def _node(self, op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        self.count += 1
        name = f"{_OUTPUT}/{self.count}"
        node = ir.node(op, list(inputs), attributes, name=name)
        output = node.outputs[0]
        output.name, output.type = name, ir.TensorType(FLOAT)
        self.graph.append(node)
        return output

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        return shared_constant(self.graph, f"{_OUTPUT}/{name}/{array.reshape(-1)[0]}", array)


def _head_size(node: ir.Node, query: ir.Value) -> int:
    """Channels of one head; 1, which overstates the scores, where the graph does not say."""
    size = query.shape[-1] if query.shape is not None else None
    if not isinstance(size, int):
        return 1
    return (
        size
        if query.shape is not None and len(query.shape) == 4
        else size // node.attributes.get_int("q_num_heads", 1)
    )
