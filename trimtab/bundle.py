"""The bundle: a compiled pipeline as a folder.

    bundle.json      what is in it: tasks, schedules, segments, engines, and every file with its hash
    bundle.sha256    the hash of bundle.json; after it was replaced, also of the one before
    graphs/          NAME.onnx and NAME.weights of every segment
    engines/TARGET/  engines of targets that do not run the graphs themselves
    tokenizers/      NAME.json

and what compiling decided or measured, where it did: removal.json, inherit.json, calibration/ranges.json.

A bundle is untrusted input. `open_bundle` believes nothing: every field is checked as it is read, no path may
leave the folder, and every file is compared with its hash before anything is made of it; weights, which are numbers
and nothing else, before anything that was made of them is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from trimtab.errors import BundleError, InputError
from trimtab.manifest import (
    OPERATORS,
    OPERATORS_DOMAIN,
    SCHEMA,
    Contents,
    FileEntry,
    from_json,
    to_json,
)
from trimtab.staging import write_file

logger = logging.getLogger(__name__)

MANIFEST = "bundle.json"
DIGEST = "bundle.sha256"
_MAX_MANIFEST = 256 << 20
_MAX_DIGEST = 1 << 10
_CHUNK = 1 << 22


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
            BundleError: A file is missing, cannot be read, or was changed.
        """
        with self.verifying((entry.path for entry in self.contents.files) if paths is None else paths):
            pass

    @contextmanager
    def verifying(self, paths: Iterable[str]) -> Iterator[None]:
        """Compares files with their hashes while the block runs. That they are there, whole, it finds before.

        Args:
            paths: Which. What the block makes of them must not be used before its end.

        Raises:
            BundleError: As from `verify`, also where the block failed: a changed file is the reason.
        """
        listed = {entry.path: entry for entry in self.contents.files}
        wanted = [path for path in paths if path not in self._verified]
        for path in wanted:
            if path not in listed:
                raise BundleError(
                    f"{self.folder}: {path} is not in the list of files: compile the bundle again"
                )
            self._check(listed[path], self._check_size)
        with ThreadPoolExecutor(max_workers=2) as pool:  # hashing lets go of the interpreter
            hashing = [pool.submit(self._check, listed[path], self._check_hash) for path in wanted]
            try:
                yield
            finally:
                for check in hashing:
                    check.result()
        self._verified.update(wanted)

    def _check(self, entry: FileEntry, check: Callable[[FileEntry, Path], None]) -> None:
        try:
            check(entry, self.folder / entry.path)
        except OSError as error:  # a name that no system takes, a failing disk
            raise BundleError(
                f"{self.folder}: {entry.path:.100} cannot be read ({error.strerror}): see who may read it, or copy the "
                "bundle again"
            ) from error

    def _check_size(self, entry: FileEntry, path: Path) -> None:
        if not path.is_file():
            raise BundleError(f"{self.folder}: {entry.path} is missing: copy the bundle again, whole")
        _check_inside(self.folder, path)
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{self.folder}: {entry.path} has {size} bytes and {entry.bytes} were written: copy the bundle again"
            )

    def _check_hash(self, entry: FileEntry, path: Path) -> None:
        if file_hash(path) != entry.sha256:
            raise BundleError(
                f"{self.folder}: {entry.path} was changed since it was written: copy the bundle again"
            )


def _check_inside(folder: Path, path: Path) -> None:
    """Raises BundleError where a file is a link to somewhere else."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{folder}: {path.relative_to(folder)} leads out of the bundle: do not use it")


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
    _check_inside(folder, manifest)
    if manifest.stat().st_size > _MAX_MANIFEST:
        raise BundleError(f"{manifest} is larger than any that trimtab writes: do not use this bundle")
    text = manifest.read_bytes()
    try:
        data = json.loads(text)
        schema = data["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{manifest} is damaged: copy the bundle again") from None
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{manifest} is damaged (schema {schema!r:.60}): copy the bundle again")
    # Before the hash, so that the answer to a newer bundle is to upgrade and not to copy it again.
    if schema > SCHEMA:
        raise BundleError(
            f"{folder} has schema {schema!r:.60} and this trimtab reads up to {SCHEMA}: upgrade trimtab, or "
            "compile again"
        )
    if not digest.is_file():
        raise BundleError(f"{folder}: {DIGEST} is missing: copy the bundle again, whole")
    _check_inside(folder, digest)
    with digest.open("rb") as stream:
        hashes = stream.read(_MAX_DIGEST).split()
    if hashlib.sha256(text).hexdigest().encode() not in hashes:
        raise BundleError(f"{folder}: {MANIFEST} was changed since it was written: copy the bundle again")
    try:
        contents = from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise BundleError(
            f"{manifest} is not as trimtab writes it ({type(error).__name__}: {error}): compile again"
        ) from None
    for segment in contents.segments.values():
        version = segment.domains.get(OPERATORS_DOMAIN, OPERATORS)
        if version > OPERATORS:
            raise BundleError(
                f"{folder}: {segment.name} has version {version} of trimtab's operators and this trimtab knows "
                f"{OPERATORS}: upgrade trimtab, or compile again"
            )
    _check_wiring(folder, contents)
    return Bundle(folder, contents)


def write_manifest(folder: Path, contents: Contents) -> None:
    """Hashes every file of a folder and writes bundle.json and bundle.sha256 beside them.

    Args:
        folder: Holds everything that ``contents`` names.
        contents: ``files`` is ignored.
    """
    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder).as_posix()
        if relative not in (MANIFEST, DIGEST):
            files.append(FileEntry(relative, path.stat().st_size, file_hash(path)))
    contents = replace(contents, files=tuple(files))
    text = _text(contents)
    (folder / MANIFEST).write_bytes(text)
    (folder / DIGEST).write_bytes(hashlib.sha256(text).hexdigest().encode())


def update_manifest(folder: Path, contents: Contents) -> None:
    """Replaces bundle.json of a bundle that others may open meanwhile.

    bundle.sha256 goes first and speaks of the old bundle.json as well, so that the bundle is whole at every moment.

    Args:
        folder: The bundle's.
        contents: ``files`` are taken as they are; nothing is hashed.

    Raises:
        InputError: The folder cannot be written.
        TrimtabError: The disk is full.
    """
    text = _text(contents)
    hashes = [hashlib.sha256(data).hexdigest() for data in ((folder / MANIFEST).read_bytes(), text)]
    write_file(folder / DIGEST, "\n".join(hashes).encode())
    write_file(folder / MANIFEST, text)


def _text(contents: Contents) -> bytes:
    data = to_json(contents)
    data["files"] = [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in contents.files]
    text = json.dumps(data, separators=(",", ":")).encode()
    from_json(json.loads(text))  # what could not be read back must not take an older bundle's place
    return text


def _check_wiring(folder: Path, contents: Contents) -> None:
    """There is something to draw; every call names a segment, and binds all inputs and outputs of it."""
    if not contents.outputs or not contents.tasks or any(not t.schedules for t in contents.tasks.values()):
        raise BundleError(f"{folder}: a bundle without an output, a task or a schedule: compile again")
    for segment in contents.segments.values():
        ranks = {spec.name: len(spec.shape) for spec in segment.inputs}
        for engine in segment.engines:
            if any(ranks.get(name) != len(dims) for name, dims in engine.shapes.items()):
                raise BundleError(
                    f"{folder}: {engine.path} has other inputs than {segment.name}: compile again"
                )
    calls = list(contents.epilogue)
    for task in contents.tasks.values():
        calls += task.prologue
        for schedule in task.schedules.values():
            calls += schedule.prologue
            calls += [call for step in schedule.steps for call in step.calls]
    for call in {id(call): call for call in calls}.values():  # steps share their calls
        called = contents.segments.get(call.segment)
        if called is None:
            raise BundleError(f"{folder}: a call of {call.segment!r}, which is no segment: compile again")
        if {spec.name for spec in called.inputs} != set(call.inputs) or {
            spec.name for spec in called.outputs
        } != set(call.outputs):
            raise BundleError(f"{folder}: a call of {call.segment} does not fit its graph: compile again")
