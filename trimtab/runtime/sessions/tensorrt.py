"""TensorRT and TensorRT for RTX: one implementation, as the two modules share the API that is used here.

That API is there from 10.3 to 11 and in TensorRT for RTX: execution contexts whose scratch memory is the caller's,
tensors by name, `execute_async_v3`.
"""

from __future__ import annotations

import importlib
import logging
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import BundleError, InputError, TargetError
from trimtab.manifest import Engine
from trimtab.runtime.sessions.base import ALIGNMENT, Buffer, Run
from trimtab.runtime.sessions.check import TITLES, check_engine, missing
from trimtab.runtime.sessions.cuda import Captured, Driver
from trimtab.runtime.sessions.device_array import DeviceArray

logger = logging.getLogger(__name__)


def import_backend(name: str) -> Any:
    """The module of a backend.

    Raises:
        MissingDependency: It is not installed.
        TargetError: It is, and cannot be loaded.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing(name) from error
    except (ImportError, OSError) as error:  # a library of its own that is not there
        raise TargetError(f"{TITLES[name]} cannot be loaded ({error}): install it again") from error


class TensorRT:
    """Engines on the first NVIDIA GPU. All contexts run in turn on one stream, so they share one scratch memory.

    Args:
        name: "tensorrt" or "tensorrt_rtx".
        driver: The GPU.
        module: The backend's module; imported by default.

    Attributes:
        use_graphs: Launch the calls of a step as one CUDA graph, where they can be captured; may be changed.

    Raises:
        MissingDependency: The backend is not installed.
    """

    def __init__(self, name: str, driver: Driver, module: Any = None) -> None:
        self._trt: Any = import_backend(name) if module is None else module
        self._driver = driver
        self.use_graphs = True
        self._log = _log(self._trt, TITLES[name])
        self._runtime: Any = self._trt.Runtime(self._log)
        self._sessions: list[TensorRTSession] = []
        self._scratch: DeviceArray | None = None
        self._generation = 0
        self._plugins: set[str] = set()

    def new(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `trimtab.runtime.sessions.Backend`."""
        return DeviceArray(self._driver, shape, dtype)

    def check(self, engine: Engine) -> None:
        """See `trimtab.runtime.sessions.Backend`."""
        check_engine(engine, self._trt.__version__, self._driver.sm, self._driver.name)

    def file(self, engine: Engine) -> str:
        """See `trimtab.runtime.sessions.Backend`."""
        return engine.path

    def load(self, engine: Engine, path: Path, plugins: Sequence[Path] = ()) -> TensorRTSession:
        """See `trimtab.runtime.sessions.Backend`."""
        self.check(engine)
        if not path.stat().st_size:
            raise BundleError(f"{path} is empty and no engine: run trimtab build on this machine")
        self._register(plugins)
        # Mapped, not read: where the CPU shares the GPU's memory, a copy on the heap would take it twice.
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            loaded = self._runtime.deserialize_cuda_engine(data)
        if loaded is None:
            raise TargetError(
                f"{path} cannot be loaded by {TITLES[engine.backend]} {self._trt.__version__}"
                f"{self._log.reason()}: run trimtab build on this machine"
            )
        session = TensorRTSession(self, self._trt, loaded, self._driver, path.name)
        self._sessions.append(session)
        self._share(session)
        return session

    def _register(self, plugins: Sequence[Path]) -> None:
        """Makes plugins known: an engine that needs one that is not cannot be deserialized."""
        if not self._plugins and hasattr(self._trt, "init_libnvinfer_plugins"):
            self._trt.init_libnvinfer_plugins(self._log, "")  # TensorRT's own
            self._plugins.add("")
        for path in plugins:
            if str(path) in self._plugins:
                continue
            if self._trt.get_plugin_registry().load_library(str(path)) is None:
                raise TargetError(
                    f"the plugin {path} cannot be registered{self._log.reason()}: run trimtab build on this machine"
                )
            self._plugins.add(str(path))

    def fused(self, runs: Sequence[Run]) -> Run:
        """See `trimtab.runtime.sessions.Backend`."""
        return _Sequence(runs, Captured(self._driver, runs, lambda: self._generation), self)

    @property
    def graphs(self) -> bool:
        """Whether steps are launched as CUDA graphs."""
        return self.use_graphs and all(session.capturable for session in self._sessions)

    @property
    def scratch_bytes(self) -> int:
        """Size of the scratch memory: the most that any one engine asks for."""
        return self._scratch.nbytes if self._scratch is not None else 0

    def synchronize(self) -> None:
        """See `trimtab.runtime.sessions.Backend`."""
        self._driver.synchronize()

    def close(self) -> None:
        """Lets go of the GPU."""
        for session in list(self._sessions):
            session.close()
        self._scratch = None
        self._runtime = None
        self._driver.close()

    def failed(self, what: str) -> TargetError:
        """The error for something that TensorRT refused, with what it said."""
        return TargetError(f"{what} failed{self._log.reason()}: run trimtab build again on this machine")

    def _share(self, session: TensorRTSession) -> None:
        """Gives a new session the scratch memory, and all of them a larger one where it is too small.

        Where there is no room for that, the session is closed and the others have one of the old size again.
        """
        before = self.scratch_bytes
        if session.scratch_bytes <= before:
            if self._scratch is not None:
                session.use(self._scratch)
            return
        try:
            self._allocate(session.scratch_bytes)
        except TargetError:
            session.close()
            if before and self._sessions:
                self._allocate(before)
            raise

    def _allocate(self, size: int) -> None:
        self._driver.synchronize()
        self._scratch = None  # the old one goes before the new one comes
        self._scratch = DeviceArray(self._driver, (size,), np.uint8)
        self._generation += 1
        for each in self._sessions:
            each.use(self._scratch)

    def _forget(self, session: TensorRTSession) -> None:
        self._sessions.remove(session)
        self._generation += 1
        if not self._sessions:
            self._scratch = None


class _Sequence:
    """Runs in turn, or as a graph where the backend wants that by the time they run."""

    def __init__(self, runs: Sequence[Run], captured: Run, backend: TensorRT) -> None:
        self._runs, self._captured, self._backend = tuple(runs), captured, backend

    def __call__(self) -> None:
        if self._backend.graphs:
            self._captured()
        else:
            for run in self._runs:
                run()


class TensorRTSession:
    """A deserialized engine with one execution context. Made by `TensorRT.load`.

    Args:
        backend: Where it belongs.
        module: tensorrt or tensorrt_rtx.
        engine: An ICudaEngine.
        driver: The GPU.
        name: Of its file, for messages.

    Raises:
        TargetError: TensorRT makes no context, or wants a tensor on the host.
    """

    def __init__(self, backend: TensorRT, module: Any, engine: Any, driver: Driver, name: str) -> None:
        self._backend, self._trt, self._engine, self._driver, self._name = (
            backend,
            module,
            engine,
            driver,
            name,
        )
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self._context: Any = engine.create_execution_context(
            module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._context is None:
            raise backend.failed(f"making a context for {name}")
        self._tensors = {
            tensor: (
                tuple(engine.get_tensor_shape(tensor)),
                np.dtype(module.nptype(engine.get_tensor_dtype(tensor))),
                engine.get_tensor_mode(tensor) == module.TensorIOMode.INPUT,
            )
            for tensor in map(engine.get_tensor_name, range(engine.num_io_tensors))
        }
        for tensor in self._tensors:
            if engine.get_tensor_location(tensor) != module.TensorLocation.DEVICE:
                raise TargetError(f"{name} wants {tensor} on the CPU, as a size: build it with fixed shapes")
        asks = getattr(self._context, "is_stream_capturable", None)  # TensorRT for RTX has it
        self.capturable = bool(asks(driver.stream)) if asks is not None else True

    def use(self, scratch: DeviceArray) -> None:
        """Sets the scratch memory, which is at least as large as the engine asks for."""
        self._context.set_device_memory(scratch.address, scratch.nbytes)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        """See `trimtab.runtime.sessions.Session`."""
        self._check(inputs, outputs)
        before: list[tuple[DeviceArray, DeviceArray]] = []
        after: list[tuple[DeviceArray, DeviceArray]] = []
        addresses: list[tuple[str, int]] = []
        for buffers, copies in ((inputs, before), (outputs, after)):
            for name, buffer in buffers.items():
                assert isinstance(buffer, DeviceArray)
                if buffer.address % ALIGNMENT:  # a row of a table: copied within the GPU
                    aligned = DeviceArray(self._driver, buffer.shape, buffer.dtype)
                    copies.append((aligned, buffer) if copies is before else (buffer, aligned))
                    buffer = aligned
                addresses.append((name, buffer.address))
        held = (tuple(inputs.values()), tuple(outputs.values()))  # the context only knows addresses
        context, stream = self._context, self._driver.stream

        def run(_held: Any = held) -> None:
            for target, source in before:
                target[...] = source
            for name, address in addresses:
                if not context.set_tensor_address(name, address):
                    raise self._backend.failed(f"binding {name} of {self._name}")
            if not context.execute_async_v3(stream):
                raise self._backend.failed(f"running {self._name}")
            for target, source in after:
                target[...] = source

        return run

    def _check(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        given = {**inputs, **outputs}
        for name, (shape, dtype, reads) in self._tensors.items():
            if name not in (inputs if reads else outputs):
                raise BundleError(f"{self._name} has a tensor {name} that its graph lacks: compile again")
            buffer = given[name]
            if buffer.dtype != dtype:
                raise BundleError(
                    f"{self._name} has {name} as {dtype} and its graph as {buffer.dtype}: compile again"
                )
            if buffer.shape != shape:
                raise InputError(
                    f"{self._name} was built for {name} of {shape} and {buffer.shape} is asked for: ask for what "
                    "it was built for, or build it for this"
                )
        if unknown := given.keys() - self._tensors.keys():
            raise BundleError(f"{self._name} lacks the tensor {min(unknown)} of its graph: compile again")

    def close(self) -> None:
        """Lets go of the context, then of the engine and its weights."""
        if self._context is not None:
            self._driver.synchronize()
            self._context = None
            self._engine = None
            self._backend._forget(self)


def _log(module: Any, title: str) -> Any:
    """A logger for TensorRT that speaks through `logging` and remembers the last error."""
    severities = module.ILogger.Severity
    levels = {
        severities.INTERNAL_ERROR: logging.ERROR,
        severities.ERROR: logging.ERROR,
        severities.WARNING: logging.INFO,  # it warns of much that nobody can act on
        severities.INFO: logging.DEBUG,
        severities.VERBOSE: logging.DEBUG,
    }

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, text: str) -> None:
            level = levels[severity]
            if level == logging.ERROR:
                self.last = text.strip().splitlines()[0] if text.strip() else ""
                level = logging.DEBUG  # it is raised
            logger.log(level, "%s: %s", title, text)

        def reason(self) -> str:
            return f" ({self.last})" if self.last else ""

    return Log()
