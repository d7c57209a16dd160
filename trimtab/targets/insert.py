"""Puts engines into a bundle that is whole at every moment.

An engine is made beside the others and takes a name that bundle.json does not know; then bundle.json is replaced, and
what it no longer names is removed last. The library that packed weights need on TensorRT 10.3 is made and named so too.
So a build that is stopped, however, loses no engine that was finished.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import onnx_ir as ir

from trimtab.bundle import Bundle, file_hash, update_manifest
from trimtab.errors import BundleError, InputError, TrimtabError
from trimtab.manifest import OPERATORS_DOMAIN, Contents, Engine, FileEntry, SegmentEntry
from trimtab.staging import FULL
from trimtab.storage import read_graph, with_engines
from trimtab.targets.base import BuildOptions, Progress
from trimtab.targets.bindings import Shapes
from trimtab.targets.device import Device
from trimtab.targets.engines import (
    ENGINES,
    build_options,
    builder_for,
    engine_entry,
    lowered_path,
    native_shapes,
    obtain,
    specialized,
)
from trimtab.targets.onnxruntime import OnnxRuntimeBuilder
from trimtab.targets.plugins.build import build_library
from trimtab.targets.wanted import needs_library, present_library, reason_to_build

if TYPE_CHECKING:
    from trimtab.targets.cache import EngineCache

_STAGE = ".building"
"""In the folder of engines: what is being made. It is removed at the next start, whatever became of its process."""


@dataclass(frozen=True)
class Made:
    """An engine that this build put into the bundle.

    Attributes:
        target: Whose.
        segment: Of which segment.
        path: Its file, relative to the bundle.
        bytes: Of the file.
        reason: Why it was made.
        seconds: What that took, the cache included.
    """

    target: str
    segment: str
    path: str
    bytes: int
    reason: str
    seconds: float


class Inserter:
    """Puts engines into one bundle."""

    def __init__(
        self, bundle: Bundle, contents: Contents, cache: EngineCache | None, progress: Progress
    ) -> None:
        self.made: list[Made] = []
        self._bundle = bundle
        self._contents = contents
        self._cache = cache
        self._progress = progress

    @contextlib.contextmanager
    def stage(self) -> Iterator[None]:
        """Makes room beside the engines, and leaves nothing that bundle.json does not name."""
        folder = self._bundle.folder
        engines = folder / ENGINES
        if not engines.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"{engines} leads out of the bundle: do not use it")
        with self._one_line():
            self._sweep()
            try:
                yield
            finally:
                self._sweep()

    def make(self, name: str, old: Engine, device: Device, version: str, why: str) -> None:
        """Makes one engine, and says so in bundle.json."""
        start = time.perf_counter()
        self._progress(f"{name} for {device.name}: {why}")
        if old.backend == "onnxruntime":
            new = self._open(name, old, device)
        else:
            new = self._same(name, old, device, version) or self._built(name, old, device, version)
        self._put(old, new)
        seconds = round(time.perf_counter() - start, 3)
        self.made.append(Made(device.name, name, new.path, new.bytes, why, seconds))

    def _same(self, name: str, wanted: Engine, device: Device, version: str) -> Engine | None:
        """An engine of another target that serves this one too, as those built ahead of time do."""
        if device.backend != "tensorrt_rtx":
            return None
        for engine in self._contents.segments[name].engines:
            as_wanted = replace(
                wanted,
                built=True,
                sm=device.sm,
                version=version,
                path=engine.path,
                bytes=engine.bytes,
                activation_bytes=engine.activation_bytes,
            )
            if replace(engine, target=wanted.target) == as_wanted and (
                reason_to_build(self._now(), engine, device, version) is None
            ):
                return as_wanted
        return None

    @functools.cached_property
    def _native(self) -> Mapping[str, Sequence[Shapes]]:
        return native_shapes(self._contents)

    def _open(self, name: str, old: Engine, device: Device) -> Engine:
        """ONNX Runtime's form of a graph: another target's, the graph itself, or what that is lowered to, beside it."""
        # Not as `_same`: sizes and a compute capability that a target has of itself are nothing to an open graph.
        for engine in self._contents.segments[name].engines:
            like = (engine.backend, engine.graph, engine.packed) == (old.backend, old.graph, old.packed)
            if engine.built and like and reason_to_build(self._now(), engine, device, "") is None:
                return replace(old, path=engine.path, bytes=engine.bytes, built=True)
        builder = OnnxRuntimeBuilder(*self._native.get(name, ())[:1])
        graph = read_graph(self._bundle, old.graph)
        model, path = builder.lower(graph, device), lowered_path(old.graph, old.backend)
        if model is graph:
            return replace(old, path=old.graph, built=True)
        stage = self._bundle.folder / ENGINES / _STAGE
        stage.mkdir(parents=True, exist_ok=True)
        info = builder.build(model, device, BuildOptions(), stage / "engine", self._progress)
        self._add(stage / "engine", path)
        return replace(old, path=path, bytes=info.bytes, built=True)

    def _built(self, name: str, old: Engine, device: Device, version: str) -> Engine:
        builder = builder_for(device, self._cache)
        model = self._graph(old)
        segment = self._contents.segments[name]
        packed = OPERATORS_DOMAIN in segment.domains
        plugins: tuple[str, ...] = ()
        if needs_library(segment, old, version):
            plugins = present_library(self._now(), device, version) or (self._library(device),)
        files = tuple(self._now().path(path) for path in plugins)
        options = build_options(device, old.shapes, old.precision, packed=packed, plugins=files)
        stage = self._bundle.folder / ENGINES / _STAGE
        info = obtain(
            self._cache,
            model,
            device,
            options,
            builder,
            stage / "engine",
            lambda text: self._progress(f"{name} for {text}"),
        )
        path = self._free_path(segment, device)
        self._add(stage / "engine", path)
        new = engine_entry(device, path, info, old.graph, old.shapes, old.precision)
        return replace(new, plugins=plugins)

    def _library(self, device: Device) -> str:
        """Builds the plugin library beside the engines of a target. Its name has its hash: no two are one file."""
        self._progress(f"the plugin library for {device.name}")
        built = build_library(self._bundle.folder / ENGINES / _STAGE)
        path = f"{ENGINES}/{device.name}/{built.stem}-{file_hash(built)[:16]}{built.suffix}"
        self._add(built, path)
        return path

    def _add(self, made: Path, path: str) -> None:
        """Gives a finished file its place, and a line in the list of files; bundle.json is not written yet."""
        file = self._bundle.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.parent.resolve().is_relative_to(self._bundle.folder.resolve()):
            raise BundleError(f"{file.parent} leads out of the bundle: do not use it")
        entry = FileEntry(path, made.stat().st_size, file_hash(made))
        made.replace(file)
        others = tuple(file for file in self._contents.files if file.path != path)
        self._contents = replace(self._contents, files=(*others, entry))

    def _graph(self, engine: Engine) -> ir.Model:
        """The graph of an engine with fixed sizes; it and the weights that it reads are verified."""
        model = read_graph(self._bundle, engine.graph)
        if all(value.shape is not None and value.shape.is_static() for value in model.graph.inputs):
            return model
        return specialized(model, engine.shapes)

    def _free_path(self, segment: SegmentEntry, device: Device) -> str:
        """A name that bundle.json does not know."""
        taken = {entry.path for entry in self._contents.files}
        stem = PurePosixPath(segment.graph).stem
        names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        return next(p for p in (f"{ENGINES}/{device.name}/{n}.engine" for n in names) if p not in taken)

    def _put(self, old: Engine, new: Engine) -> None:
        """Lets bundle.json name the new engine in the old one's place."""
        contents = self._contents
        engines = {
            segment.name: [new if engine is old else engine for engine in segment.engines]
            for segment in contents.segments.values()
        }
        contents = with_engines(contents, engines)
        used = _used(contents)
        files = [f for f in contents.files if not f.path.startswith(f"{ENGINES}/") or f.path in used]
        self._contents = replace(contents, files=tuple(sorted(files, key=lambda entry: entry.path)))
        update_manifest(self._bundle.folder, self._contents)
        self._sweep()

    def _sweep(self) -> None:
        """Removes engines that bundle.json does not name: half of one, or one that another took the place of."""
        named = _used(self._contents)
        engines = self._bundle.folder / ENGINES
        if (engines / _STAGE).is_symlink():
            (engines / _STAGE).unlink()
        shutil.rmtree(engines / _STAGE, ignore_errors=True)
        for folder in engines.iterdir() if engines.is_dir() else ():
            if folder.is_symlink():  # nothing out there is ours
                continue
            for path in (*folder.glob("*.engine"), *folder.glob("*.so")):
                if path.relative_to(self._bundle.folder).as_posix() not in named:
                    path.unlink()

    def _now(self) -> Bundle:
        return Bundle(self._bundle.folder, self._contents)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Errors of the disk, said in one line."""
        folder = self._bundle.folder
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise TrimtabError(
                    f"the disk of {folder} is full; what was finished is kept: make room, and build again"
                ) from error
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise InputError(
                    f"{folder} cannot be written ({error.strerror}): copy the bundle to where it can"
                ) from error
            raise


def _used(contents: Contents) -> set[str]:
    """Every file that some engine is, or needs beside it."""
    engines = [engine for segment in contents.segments.values() for engine in segment.engines]
    return {path for engine in engines for path in (engine.path, *engine.plugins)}
