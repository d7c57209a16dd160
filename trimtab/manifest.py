"""What bundle.json says, as dataclasses, and the way there and back.

Reading believes nothing: every field is checked as it is read, and no path may leave the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeVar

from trimtab.program import Call, PassEntry, Schedule, Step, Task, TensorSpec

SCHEMA = 1
"""Goes up when an older trimtab could misread a bundle."""

OPERATORS_DOMAIN = "trimtab"
OPERATORS = 1
"""Version of the operators in that domain. Goes up when what a node of a graph means changes."""

BACKENDS = ("onnxruntime", "tensorrt", "tensorrt_rtx")
"""Which runtimes load an engine."""

VIEWS = "trimtab.view."
"""Inputs and outputs of a graph whose names begin so lie in one buffer, which is the session's own: what an output has
written, an input reads as numbers of another width. ONNX has no operator for that."""

REMOVAL_PLAN = "removal.json"
"""File of a bundle: which layers were removed, and at what cost; there where some were."""

DTYPES = frozenset(
    (
        "bool",
        "float16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
    )
)
"""What numpy has of ONNX's types, without objects and texts."""

_LONGEST = 1000
"""Characters of a name or a size: they stand in messages of one line, and sizes are walked recursively."""

_FLOAT32_MAX = 2.0**128 - 2.0**104

T = TypeVar("T")


@dataclass(frozen=True)
class Engine:
    """What one target runs for a segment, at one size or at all.

    Attributes:
        target: A device of `trimtab.targets`, such as "cpu".
        backend: Which runtime loads it: one of `BACKENDS`.
        path: File, relative to the bundle: the engine, or the graph where it is not built yet.
        bytes: Size of what the backend loads, weights with it.
        graph: The graph that it was or will be built from, relative to the bundle.
        built: False where ``trimtab build`` has still to make it, on the device.
        version: The backend's exact version that built it and alone loads it; empty where every version does.
        sm: The compute capability that it was built for; None where that does not matter.
        precision: "fp32", "fp16" or "bf16".
        shapes: Graph input -> sizes that are fixed; empty where they are open.
        plugins: Files to register before it is loaded, relative to the bundle.
        activation_bytes: Device memory that it asks for beside its weights; None where nobody said.
        packed: Its graph decodes weights whenever it runs.
    """

    target: str
    backend: str
    path: str
    bytes: int
    graph: str
    built: bool = True
    version: str = ""
    sm: str | None = None
    precision: str = "fp32"
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    activation_bytes: int | None = None
    packed: bool = False


@dataclass(frozen=True)
class SegmentEntry:
    """One graph of a bundle.

    Attributes:
        name: The segment's name.
        graph: The ONNX file, relative to the bundle.
        parameters: Elements of its floating-point weights.
        weight_bytes: Bytes of all its weights.
        inputs: The graph's inputs; open sizes are expressions over the segment's own symbols.
        outputs: The graph's outputs.
        engines: One for each target, and for each size where sizes are fixed.
        domains: Operator domain beside ONNX's own -> version, as far as the graph names them.
    """

    name: str
    graph: str
    parameters: int
    weight_bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    engines: tuple[Engine, ...]
    domains: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle.

    Attributes:
        path: Relative to the bundle, with forward slashes.
        bytes: Size.
        sha256: Hash of its contents, in hexadecimal.
    """

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Contents:
    """Everything that bundle.json says. See `trimtab.program.Program` for the fields that they share."""

    tasks: Mapping[str, Task]
    epilogue: tuple[Call, ...]
    outputs: tuple[TensorSpec, ...]
    segments: Mapping[str, SegmentEntry]
    size: tuple[int, int]
    size_multiple: int
    fixed_size: str | None
    slots: int
    tokenizers: Mapping[str, str]
    metadata: Mapping[str, str]
    passes: tuple[PassEntry, ...] = ()
    files: tuple[FileEntry, ...] = ()
    version: str = ""
    trained_size: tuple[int, int] | None = None
    largest_side: int | None = None


def to_json(contents: Contents) -> dict[str, Any]:
    """The contents as plain data. Equal calls are written once and referred to by number."""
    calls: list[Call] = []
    numbers: dict[str, int] = {}

    def number(call: Call) -> int:
        key = repr((call.segment, sorted(call.inputs.items()), sorted(call.outputs.items())))
        if key not in numbers:
            numbers[key] = len(calls)
            calls.append(call)
        return numbers[key]

    tasks = [
        {
            "name": name,
            "inputs": [_spec_json(spec) for spec in task.inputs],
            "prologue": [number(call) for call in task.prologue],
            "schedules": [
                {
                    "name": schedule_name,
                    "prologue": [number(call) for call in schedule.prologue],
                    "steps": [_step_json(step, number) for step in schedule.steps],
                    "least_pixels": schedule.least_pixels,
                    "size_multiple": schedule.size_multiple,
                    **({"constants": _constants_json(schedule.constants)} if schedule.constants else {}),
                }
                for schedule_name, schedule in task.schedules.items()
            ],
            "guidance": task.guidance,
            "strength": task.strength,
            "strength_rounds_up": task.strength_rounds_up,
            **({"strength_steps": task.strength_steps} if task.strength_steps else {}),
        }
        for name, task in contents.tasks.items()
    ]
    epilogue = [number(call) for call in contents.epilogue]
    return {
        "schema": SCHEMA,
        "trimtab": contents.version,
        "metadata": dict(contents.metadata),
        "size": list(contents.size),
        **({"trained_size": list(contents.trained_size)} if contents.trained_size else {}),
        "size_multiple": contents.size_multiple,
        "fixed_size": contents.fixed_size,
        **({"largest_side": contents.largest_side} if contents.largest_side else {}),
        "slots": contents.slots,
        "segments": [_segment_json(segment) for segment in contents.segments.values()],
        "tasks": tasks,
        "epilogue": epilogue,
        "outputs": [_spec_json(spec) for spec in contents.outputs],
        "calls": [
            {"segment": c.segment, "inputs": dict(c.inputs), "outputs": dict(c.outputs)} for c in calls
        ],
        "tokenizers": dict(contents.tokenizers),
        "passes": [vars(entry) for entry in contents.passes],
    }


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    data: dict[str, Any] = {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
    return data | {"source": dict(spec.source)} if spec.source else data


def _step_json(step: Step, number: Any) -> dict[str, Any]:
    data = {"calls": [number(call) for call in step.calls], "constants": _constants_json(step.constants)}
    return data | {"draws": list(step.draws)} if step.draws else data


def _constants_json(constants: Mapping[str, tuple[float, ...]]) -> dict[str, list[float]]:
    # Nine digits give every float32 back.
    return {name: [float(f"{v:.9g}") for v in values] for name, values in constants.items()}


def _segment_json(segment: SegmentEntry) -> dict[str, Any]:
    return {
        "name": segment.name,
        "graph": segment.graph,
        "parameters": segment.parameters,
        "weight_bytes": segment.weight_bytes,
        "inputs": [_spec_json(spec) for spec in segment.inputs],
        "outputs": [_spec_json(spec) for spec in segment.outputs],
        "engines": [vars(engine) for engine in segment.engines],
        "domains": dict(segment.domains),
    }


def from_json(data: Mapping[str, Any]) -> Contents:
    """The contents from plain data.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: The data are not as `to_json` writes them.
    """
    calls = [
        Call(_of(str, c["segment"]), _strings(c["inputs"]), _strings(c["outputs"])) for c in data["calls"]
    ]

    def chosen(numbers: Sequence[int]) -> tuple[Call, ...]:
        if any(type(n) is not int or not 0 <= n < len(calls) for n in numbers):
            raise ValueError("a call that is not in the list")
        return tuple(calls[n] for n in numbers)

    tasks = {}
    for task in _named(data["tasks"]):
        schedules = {
            schedule["name"]: Schedule(
                steps=tuple(_step(step, chosen) for step in schedule["steps"]),
                prologue=chosen(schedule["prologue"]),
                least_pixels=_count(schedule.get("least_pixels", 0)),
                size_multiple=_count(schedule.get("size_multiple", 1), 1),
                constants=_constants(schedule.get("constants", {})),
            )
            for schedule in _named(task["schedules"])
        }
        tasks[task["name"]] = Task(
            inputs=tuple(_spec(spec) for spec in task["inputs"]),
            prologue=chosen(task["prologue"]),
            schedules=schedules,
            guidance=None if task["guidance"] is None else _finite(task["guidance"]),
            strength=None if task["strength"] is None else _finite(task["strength"]),
            strength_rounds_up=_of(bool, task["strength_rounds_up"]),
            strength_steps=None if task.get("strength_steps") is None else _count(task["strength_steps"], 1),
        )
    segments = {}
    for entry in _named(data["segments"]):
        segments[entry["name"]] = SegmentEntry(
            name=entry["name"],
            graph=_safe(entry["graph"]),
            parameters=_count(entry["parameters"]),
            weight_bytes=_count(entry["weight_bytes"]),
            inputs=tuple(_spec(spec) for spec in entry["inputs"]),
            outputs=tuple(_spec(spec) for spec in entry["outputs"]),
            engines=tuple(_engine(engine) for engine in entry["engines"]),
            domains={_of(str, k): _of(int, v) for k, v in entry.get("domains", {}).items()},
        )
    trained, largest = data.get("trained_size"), data.get("largest_side")
    return Contents(
        tasks=tasks,
        epilogue=chosen(data["epilogue"]),
        outputs=tuple(_spec(spec) for spec in data["outputs"]),
        segments=segments,
        size=_size(data["size"]),
        trained_size=None if trained is None else _size(trained),
        size_multiple=_count(data["size_multiple"], 1),
        fixed_size=None if data["fixed_size"] is None else _of(str, data["fixed_size"]),
        largest_side=None if largest is None else _count(largest, 1),
        slots=_count(data["slots"], 1),
        tokenizers={_of(str, k): _safe(v) for k, v in data["tokenizers"].items()},
        metadata=_strings(data["metadata"]),
        passes=tuple(
            PassEntry(_of(str, p["name"]), _of(str, p["segment"]), _count(p["applied"]), _count(p["refused"]))
            for p in data["passes"]
        ),
        files=tuple(
            FileEntry(_safe(f["path"]), _count(f["bytes"]), _of(str, f["sha256"])) for f in data["files"]
        ),
        version=_of(str, data["trimtab"]),
    )


def _step(data: Mapping[str, Any], chosen: Callable[[Sequence[int]], tuple[Call, ...]]) -> Step:
    return Step(
        chosen(data["calls"]),
        _constants(data["constants"]),
        tuple(_of(str, name) for name in data.get("draws", ())),
    )


def _constants(data: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    return {_of(str, name): tuple(_finite(v) for v in values) for name, values in data.items()}


def _engine(data: Mapping[str, Any]) -> Engine:
    shapes = {_of(str, name): tuple(_count(dim, 1) for dim in dims) for name, dims in data["shapes"].items()}
    return Engine(
        target=_of(str, data["target"]),
        backend=_of(str, data["backend"]),
        path=_safe(data["path"]),
        bytes=_count(data["bytes"]),
        graph=_safe(data["graph"]),
        built=_of(bool, data["built"]),
        version=_of(str, data["version"]),
        sm=None if data["sm"] is None else _of(str, data["sm"]),
        precision=_of(str, data["precision"]),
        shapes=shapes,
        plugins=tuple(_safe(path) for path in data["plugins"]),
        activation_bytes=None if data["activation_bytes"] is None else _count(data["activation_bytes"]),
        packed=_of(bool, data["packed"]),
    )


def _spec(data: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(_of(str, dim) if isinstance(dim, str) else _count(dim) for dim in data["shape"])
    if data["dtype"] not in DTYPES:
        raise ValueError(f"{data['dtype']!r:.60} is no type of numbers")
    source = dict(data.get("source", {}))
    if any(not isinstance(value, str | int | float | bool) for value in source.values()):
        raise TypeError("an input's source is not plain")
    return TensorSpec(_of(str, data["name"]), data["dtype"], shape, source)


def _of(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.60} is not {kind.__name__}")
    if isinstance(value, str) and (len(value) > _LONGEST or not value.isprintable()):
        raise ValueError(f"{value!r:.60} is longer than a line, or no text")
    return value


def _count(value: Any, least: int = 0) -> int:
    if not least <= _of(int, value) < 2**63:
        raise ValueError(f"{value!r:.60} is below {least} or beyond 64 bits")
    return int(value)


def _size(data: Any) -> tuple[int, int]:
    width, height = data
    return _count(width, 1), _count(height, 1)


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= _FLOAT32_MAX:  # NaN neither
        raise ValueError(f"{value!r:.60} is not a finite number of 32 bits")
    return float(value)


def _named(entries: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    names = [_of(str, entry["name"]) for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError("a name stands there twice")
    return entries


def _strings(data: Mapping[str, Any]) -> dict[str, str]:
    return {_of(str, key): _of(str, value) for key, value in data.items()}


def _safe(path: Any) -> str:
    """A path that stays in the folder, whatever system reads it."""
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"the path {path!r:.100} leaves the bundle")
    return _of(str, path)
