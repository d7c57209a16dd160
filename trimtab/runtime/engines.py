"""The engines of one target of a bundle: chosen for this machine, checked, loaded when they are first needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from trimtab.bundle import Bundle
from trimtab.errors import BundleError, InputError, TrimtabError, WrongDevice
from trimtab.manifest import Contents, Engine
from trimtab.runtime.arguments import is_whole
from trimtab.runtime.external import external_locations
from trimtab.runtime.sessions import Backend, Buffer, Run, Session, open_backend

MAX_THREADS = 1024
"""More than machines have cores. Those beyond only wait in turn, and with many more of them no run ends."""


class _Loaded(NamedTuple):
    """A loaded engine, and what deferred sessions bound of it: a run holds its engine, so both go together."""

    segment: str
    session: Session
    runs: dict[object, Run]


class Engines:
    """Loaded engines, in the order in which they are asked for.

    Args:
        bundle: From `trimtab.bundle.open_bundle`.
        target: Whose engines; None for those that were built for this machine, else the first that it can run.
        provider: Where ONNX Runtime runs its graphs: "cpu" or "cuda"; None for "cpu".
        threads: CPU threads for one operator; 0 for one a core.
        low_memory: Hold the engines of one stage at a time: each part of the prologue, then those of the steps,
            then the decoder. They are loaded again for every picture.
        fast: On the CPU, decode packed weights once, at load; on CUDA, products in TF32.

    Raises:
        InputError: No such number of threads.
        WrongDevice: No target that this machine can run, or not the one that was asked for.
        MissingDependency: Its backend is not installed.
        TargetError: It needs a GPU, and there is none.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: str | None = None,
        provider: str | None = None,
        threads: int = 0,
        low_memory: bool = False,
        fast: bool = False,
    ) -> None:
        if not is_whole(threads) or not 0 <= threads <= MAX_THREADS:
            raise InputError(
                f"{threads!r:.60} threads were asked for: give 0 for one a core, or up to {MAX_THREADS}"
            )
        self._bundle = bundle
        self.target, self.backend = _choose(bundle, target, provider, threads, fast)
        self._loaded: dict[str, _Loaded] = {}
        self._stages = _stages(bundle.contents) if low_memory else None

    def session(self, segment: str, inputs: Mapping[str, Buffer] | None = None) -> Session:
        """The engine of a segment: loaded, or with ``low_memory`` one that is loaded whenever it runs.

        Args:
            segment: Its name.
            inputs: What it will read; of engines for several sizes it is the one for theirs.

        Raises:
            InputError: There are engines for other sizes only.
            BundleError: A file is missing or was changed.
            WrongDevice, TargetError: The engine cannot run here.
        """
        engine = self._engine(segment, inputs or {})
        return _Deferred(self, segment, engine) if self._stages else self.loaded(segment, engine).session

    def loaded(self, segment: str, engine: Engine) -> _Loaded:
        """An engine, loaded if it is not; those of other stages go first where memory is low."""
        if engine.path not in self._loaded:
            if self._stages is not None:
                stage = self._stages[segment]
                self._close(p for p, loaded in self._loaded.items() if self._stages[loaded.segment] != stage)
            self._loaded[engine.path] = _Loaded(segment, self._load(engine), {})
        return self._loaded[engine.path]

    def _load(self, engine: Engine) -> Session:
        """A session of verified files.

        A graph's weights are hashed while ONNX Runtime lays them out, which takes about as long. They are numbers, and
        nobody has the session before they are known to be right.
        """
        file = self.backend.file(engine)
        self._bundle.verify([file, *engine.plugins])
        weights = self._weights(file) if engine.backend == "onnxruntime" else []
        plugins = [self._bundle.path(path) for path in engine.plugins]
        with self._bundle.verifying(weights):
            return self.backend.load(engine, self._bundle.path(file), plugins)

    def _weights(self, file: str) -> list[str]:
        """The files beside a graph that it reads.

        Raises:
            BundleError: It is another format's.
        """
        if not file.endswith(".onnx"):  # ONNX Runtime's own format, by its name
            raise BundleError(f"{self._bundle.folder}: {file} is no .onnx file: compile the bundle again")
        folder = PurePosixPath(file).parent
        named = external_locations(self._bundle.path(file))
        return sorted({(folder / location).as_posix() for location in named})

    def precision(self, segment: str) -> str:
        """What the engines of a segment compute in."""
        return _engines(self._bundle.contents, segment, self.target)[0].precision

    def _engine(self, segment: str, inputs: Mapping[str, Buffer]) -> Engine:
        engines = _engines(self._bundle.contents, segment, self.target)
        for engine in engines:
            if all(inputs[name].shape == shape for name, shape in engine.shapes.items() if name in inputs):
                return engine
        if not engines:
            raise InputError(
                f"there is no engine of {segment} for {self.target}, as the sizes that were compiled do not call it: "
                "ask for one of them, or compile with this one as well"
            )
        name, shape = next((n, s) for n, s in engines[0].shapes.items() if inputs[n].shape != s)
        raise InputError(
            f"the engines of {segment} for {self.target} take {name} of {shape} and {inputs[name].shape} is asked "
            "for: ask for a size that they were built for, or compile with this one as well"
        )

    def close(self) -> None:
        """Lets go of the engines and of the device."""
        self._close(self._loaded)
        self.backend.close()

    def _close(self, paths: Iterable[str]) -> None:
        for path in list(paths):
            loaded = self._loaded.pop(path)
            loaded.runs.clear()
            loaded.session.close()


class _Deferred:
    """A session that is loaded whenever it runs and is not there."""

    def __init__(self, engines: Engines, segment: str, engine: Engine) -> None:
        self._engines, self._segment, self._engine = engines, segment, engine

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        key = object()

        def run() -> None:
            loaded = self._engines.loaded(self._segment, self._engine)
            if key not in loaded.runs:
                loaded.runs[key] = loaded.session.bind(inputs, outputs)
            loaded.runs[key]()

        return run

    def close(self) -> None:
        """The engine belongs to `Engines`."""


def _stages(contents: Contents) -> dict[str, str]:
    """Segment -> its stage: all that some step calls are one, as they take turns; any other is its own."""
    stages = {name: name for name in contents.segments}
    for task in contents.tasks.values():
        for schedule in task.schedules.values():
            for step in schedule.steps:
                stages.update((call.segment, "steps") for call in step.calls)
    return stages


def _for_larger(contents: Contents) -> set[str]:
    """Segments that only pictures of more than the native size call: engines of fixed sizes may lack them."""
    called: dict[bool, set[str]] = {False: set(), True: set()}
    for task in contents.tasks.values():
        for schedule in task.schedules.values():
            called[schedule.least_pixels > 0] |= {c.segment for step in schedule.steps for c in step.calls}
    return called[True] - called[False]


def _engines(contents: Contents, segment: str, target: str) -> list[Engine]:
    return [engine for engine in contents.segments[segment].engines if engine.target == target]


def _choose(
    bundle: Bundle, target: str | None, provider: str | None, threads: int, fast: bool
) -> tuple[str, Backend]:
    """The target to run and its backend, opened; every engine is checked against this machine."""
    contents = bundle.contents
    known = {e.target: e.backend for segment in contents.segments.values() for e in segment.engines}
    if target is not None and target not in known:
        raise WrongDevice(
            f"{bundle.folder} has no engines for {target}: it has {', '.join(known) or 'none'}; compile with "
            f"--target {target}"
        )
    if provider is not None and target is not None and known[target] != "onnxruntime":
        raise InputError(
            f"a provider is ONNX Runtime's, and {target} runs on {known[target]}: leave --provider or --target out"
        )
    # What was built for one GPU is the better choice where it runs at all.
    wanted = [target] if target is not None else sorted(known, key=lambda name: known[name] == "onnxruntime")
    reasons = []
    for name in wanted:
        if provider is not None and known[name] != "onnxruntime":
            continue
        try:
            return name, _open(bundle, name, provider or "cpu", threads, fast)
        except TrimtabError as error:
            if target is not None or provider is not None or len(wanted) == 1:
                raise
            reasons.append(f"{name}: {error}")
    said = "; ".join(reasons)
    raise WrongDevice(
        f"{bundle.folder} has no engines that this machine can run{f' ({said})' if said else ''}: compile with "
        "--target cpu"
    )


def _open(bundle: Bundle, target: str, provider: str, threads: int, fast: bool) -> Backend:
    engines: list[Engine] = []
    larger = _for_larger(bundle.contents)
    for name in bundle.contents.segments:
        made = _engines(bundle.contents, name, target)
        if not all(engine.built for engine in made) or (not made and name not in larger):
            raise WrongDevice(
                f"{bundle.folder} has no engine of {name} for {target} yet: run trimtab build {bundle.folder} "
                f"--target {target} on the device"
            )
        engines += made
    backends = {engine.backend for engine in engines}
    if len(backends) > 1:
        raise BundleError(
            f"the engines for {target} are of {' and '.join(sorted(backends))}, whose buffers do not lie in one "
            "memory: compile again"
        )
    backend = open_backend(backends.pop(), provider=provider, threads=threads, fast=fast)
    try:
        for engine in engines:
            backend.check(engine)
    except BaseException:
        backend.close()
        raise
    return backend
