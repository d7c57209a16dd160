"""The bundle: a compiled pipeline as a folder.

    bundle.json      what is in it: tasks, schedules, segments, engines, and every file with its hash
    bundle.sha256    the hash of bundle.json
    graphs/          NAME.onnx and NAME.weights of every segment
    engines/TARGET/  engines of targets that do not run the graphs themselves
    tokenizers/      NAME.json

A bundle is untrusted input. `open_bundle` believes nothing: every field is checked as it is read, no path may
leave the folder, and every file is compared with its hash before anything is made of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from trimtab.errors import BundleError, InputError
from trimtab.program import Call, PassEntry, Schedule, Step, Task, TensorSpec

logger = logging.getLogger(__name__)

SCHEMA = 1
"""Goes up when an older trimtab could misread a bundle."""

MANIFEST = "bundle.json"
DIGEST = "bundle.sha256"
_MAX_MANIFEST = 256 << 20
_CHUNK = 1 << 22

T = TypeVar("T")


@dataclass(frozen=True)
class Engine:
    """What one target runs for a segment.

    Attributes:
        target: A device of `trimtab.targets`, such as "cpu".
        backend: Which runtime loads it: "onnxruntime", ...
        path: File, relative to the bundle.
        bytes: Size of what the backend loads, weights with it.
    """

    target: str
    backend: str
    path: str
    bytes: int


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
        engines: One for each target.
    """

    name: str
    graph: str
    parameters: int
    weight_bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    engines: tuple[Engine, ...]


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


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        folder: Where it lies.
        contents: What bundle.json says.
    """

    folder: Path
    contents: Contents
    _verified: set[str] = field(default_factory=set, compare=False, repr=False)

    def path(self, relative: str) -> Path:
        """A file of the bundle that was verified, or is now.

        Raises:
            BundleError: The file is not listed, missing, or not what was written.
        """
        if relative not in self._verified:
            self.verify([relative])
        return self.folder / relative

    def verify(self, paths: Iterable[str] | None = None) -> None:
        """Compares files with their hashes.

        Args:
            paths: Which; None for all.

        Raises:
            BundleError: A file is missing or was changed.
        """
        listed = {entry.path: entry for entry in self.contents.files}
        wanted = list(listed) if paths is None else list(paths)
        for path in wanted:
            if path not in listed:
                raise BundleError(
                    f"{self.folder}: {path} is not in the list of files: compile the bundle again"
                )
        with ThreadPoolExecutor(max_workers=2) as pool:  # hashing lets go of the interpreter
            list(pool.map(self._check, (listed[path] for path in wanted if path not in self._verified)))
        self._verified.update(wanted)

    def _check(self, entry: FileEntry) -> None:
        path = self.folder / entry.path
        if not path.is_file():
            raise BundleError(f"{self.folder}: {entry.path} is missing: copy the bundle again, whole")
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise BundleError(f"{self.folder}: {entry.path} leads out of the bundle: do not use it")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{self.folder}: {entry.path} has {size} bytes and {entry.bytes} were written: copy the bundle again"
            )
        if file_hash(path) != entry.sha256:
            raise BundleError(
                f"{self.folder}: {entry.path} was changed since it was written: copy the bundle again"
            )


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def open_bundle(folder: Path) -> Bundle:
    """Reads and checks bundle.json. Other files are verified when they are asked for.

    Raises:
        InputError: No such folder.
        BundleError: Not a bundle, a damaged one, or one of a newer trimtab.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give a bundle made by trimtab compile")
    manifest, digest = folder / MANIFEST, folder / DIGEST
    if not manifest.is_file():
        raise BundleError(f"{folder} holds no {MANIFEST}: give a bundle made by trimtab compile")
    if manifest.stat().st_size > _MAX_MANIFEST:
        raise BundleError(f"{manifest} is larger than any that trimtab writes: do not use this bundle")
    text = manifest.read_bytes()
    try:
        data = json.loads(text)
        schema = data["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{manifest} is damaged: copy the bundle again") from None
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{manifest} is damaged (schema {schema!r}): copy the bundle again")
    # Before the hash, so that the answer to a newer bundle is to upgrade and not to copy it again.
    if schema > SCHEMA:
        raise BundleError(
            f"{folder} has schema {schema} and this trimtab reads up to {SCHEMA}: upgrade trimtab, or compile again"
        )
    if not digest.is_file():
        raise BundleError(f"{folder}: {DIGEST} is missing: copy the bundle again, whole")
    if digest.read_bytes().strip() != hashlib.sha256(text).hexdigest().encode():
        raise BundleError(f"{folder}: {MANIFEST} was changed since it was written: copy the bundle again")
    try:
        contents = _contents(data)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{manifest} is not as trimtab writes it ({type(error).__name__}: {error}): compile again"
        ) from None
    _check_wiring(folder, contents)
    return Bundle(folder, contents)


def write_manifest(folder: Path, contents: Contents) -> Contents:
    """Hashes every file of a folder and writes bundle.json and bundle.sha256 beside them.

    Args:
        folder: Holds everything that ``contents`` names.
        contents: ``files`` is ignored.

    Returns:
        The contents with their files.
    """
    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder).as_posix()
        if relative not in (MANIFEST, DIGEST):
            files.append(FileEntry(relative, path.stat().st_size, file_hash(path)))
    data = to_json(contents)
    data["files"] = [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in files]
    text = json.dumps(data, indent=1).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / DIGEST).write_bytes(hashlib.sha256(text).hexdigest().encode())
    return _contents(data)


# ---- data to dataclasses and back ----


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
                }
                for schedule_name, schedule in task.schedules.items()
            ],
            "guidance": task.guidance,
            "strength": task.strength,
            "strength_rounds_up": task.strength_rounds_up,
        }
        for name, task in contents.tasks.items()
    ]
    epilogue = [number(call) for call in contents.epilogue]
    return {
        "schema": SCHEMA,
        "trimtab": contents.version,
        "metadata": dict(contents.metadata),
        "size": list(contents.size),
        "size_multiple": contents.size_multiple,
        "fixed_size": contents.fixed_size,
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
    # Nine digits give every float32 back.
    constants = {name: [float(f"{v:.9g}") for v in values] for name, values in step.constants.items()}
    data = {"calls": [number(call) for call in step.calls], "constants": constants}
    return data | {"draws": list(step.draws)} if step.draws else data


def _segment_json(segment: SegmentEntry) -> dict[str, Any]:
    return {
        "name": segment.name,
        "graph": segment.graph,
        "parameters": segment.parameters,
        "weight_bytes": segment.weight_bytes,
        "inputs": [_spec_json(spec) for spec in segment.inputs],
        "outputs": [_spec_json(spec) for spec in segment.outputs],
        "engines": [vars(engine) for engine in segment.engines],
    }


def _contents(data: Mapping[str, Any]) -> Contents:
    calls = [
        Call(_of(str, c["segment"]), _strings(c["inputs"]), _strings(c["outputs"])) for c in data["calls"]
    ]

    def chosen(numbers: Sequence[int]) -> tuple[Call, ...]:
        if any(type(n) is not int or not 0 <= n < len(calls) for n in numbers):
            raise ValueError("a call that is not in the list")
        return tuple(calls[n] for n in numbers)

    tasks = {}
    for task in data["tasks"]:
        schedules = {
            _of(str, schedule["name"]): Schedule(
                steps=tuple(_step(step, chosen) for step in schedule["steps"]),
                prologue=chosen(schedule["prologue"]),
            )
            for schedule in task["schedules"]
        }
        tasks[_of(str, task["name"])] = Task(
            inputs=tuple(_spec(spec) for spec in task["inputs"]),
            prologue=chosen(task["prologue"]),
            schedules=schedules,
            guidance=None if task["guidance"] is None else float(task["guidance"]),
            strength=None if task["strength"] is None else float(task["strength"]),
            strength_rounds_up=_of(bool, task["strength_rounds_up"]),
        )
    segments = {}
    for entry in data["segments"]:
        segments[_of(str, entry["name"])] = SegmentEntry(
            name=entry["name"],
            graph=_safe(entry["graph"]),
            parameters=_of(int, entry["parameters"]),
            weight_bytes=_of(int, entry["weight_bytes"]),
            inputs=tuple(_spec(spec) for spec in entry["inputs"]),
            outputs=tuple(_spec(spec) for spec in entry["outputs"]),
            engines=tuple(
                Engine(_of(str, e["target"]), _of(str, e["backend"]), _safe(e["path"]), _of(int, e["bytes"]))
                for e in entry["engines"]
            ),
        )
    width, height = data["size"]
    return Contents(
        tasks=tasks,
        epilogue=chosen(data["epilogue"]),
        outputs=tuple(_spec(spec) for spec in data["outputs"]),
        segments=segments,
        size=(_of(int, width), _of(int, height)),
        size_multiple=_of(int, data["size_multiple"]),
        fixed_size=None if data["fixed_size"] is None else _of(str, data["fixed_size"]),
        slots=_of(int, data["slots"]),
        tokenizers={_of(str, k): _safe(v) for k, v in data["tokenizers"].items()},
        metadata=_strings(data["metadata"]),
        passes=tuple(
            PassEntry(
                _of(str, p["name"]), _of(str, p["segment"]), _of(int, p["applied"]), _of(int, p["refused"])
            )
            for p in data["passes"]
        ),
        files=tuple(
            FileEntry(_safe(f["path"]), _of(int, f["bytes"]), _of(str, f["sha256"])) for f in data["files"]
        ),
        version=_of(str, data["trimtab"]),
    )


def _step(data: Mapping[str, Any], chosen: Callable[[Sequence[int]], tuple[Call, ...]]) -> Step:
    return Step(
        chosen(data["calls"]),
        {_of(str, k): tuple(float(v) for v in values) for k, values in data["constants"].items()},
        tuple(_of(str, name) for name in data.get("draws", ())),
    )


def _spec(data: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(data["shape"])
    if any(type(dim) not in (int, str) for dim in shape):
        raise TypeError("a size is neither a number nor an expression")
    source = dict(data.get("source", {}))
    if any(not isinstance(value, str | int | float | bool) for value in source.values()):
        raise TypeError("an input's source is not plain")
    return TensorSpec(_of(str, data["name"]), _of(str, data["dtype"]), shape, source)


def _of(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.60} is not {kind.__name__}")
    return value


def _strings(data: Mapping[str, Any]) -> dict[str, str]:
    return {_of(str, key): _of(str, value) for key, value in data.items()}


def _safe(path: Any) -> str:
    """A path that stays in the folder, whatever system reads it."""
    parts = PurePosixPath(_of(str, path))
    if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"the path {path!r:.100} leaves the bundle")
    return str(path)


def _check_wiring(folder: Path, contents: Contents) -> None:
    """Every call names a segment, and binds all inputs and outputs of it."""
    calls = list(contents.epilogue)
    for task in contents.tasks.values():
        calls += task.prologue
        for schedule in task.schedules.values():
            calls += schedule.prologue
            calls += [call for step in schedule.steps for call in step.calls]
    for call in {id(call): call for call in calls}.values():  # steps share their calls
        segment = contents.segments.get(call.segment)
        if segment is None:
            raise BundleError(f"{folder}: a call of {call.segment!r}, which is no segment: compile again")
        if {spec.name for spec in segment.inputs} != set(call.inputs) or {
            spec.name for spec in segment.outputs
        } != set(call.outputs):
            raise BundleError(f"{folder}: a call of {call.segment} does not fit its graph: compile again")
