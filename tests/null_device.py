"""A GPU that is not there: libcuda and TensorRT as far as trimtab calls them, in the memory of the host.

Everything that is queued waits until somebody synchronises, so that a result which is read too early is wrong. An
engine is a JSON file that names an ONNX graph and the one shape of every tensor; ONNX Runtime computes it.
"""

from __future__ import annotations

import bisect
import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

STREAM = 0x77
INVALID, OUT_OF_MEMORY, NO_DEVICE, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 1, 2, 100, 900, 901


class NullCuda:
    """Behaves like libcuda for one GPU and one stream.

    Attributes:
        log: What was called, in order, without what only asks.
        uploads, downloads: Copies between host and device.
        live: Address -> size of what is allocated.
    """

    def __init__(
        self,
        sm: tuple[int, int] = (8, 9),
        memory: int = 8 << 30,
        *,
        devices: int = 1,
        integrated: bool = False,
    ) -> None:
        self.sm, self.memory, self.devices, self.integrated = sm, memory, devices, integrated
        self.log: list[str] = []
        self.uploads = self.downloads = 0
        self.live: dict[int, int] = {}
        self._starts: list[int] = []
        self._held: dict[int, Any] = {}
        self._queue: list[Callable[[], None]] = []
        self._capturing: list[Callable[[], None]] | None = None
        self._invalid = False
        self._graphs: dict[int, list[Callable[[], None]]] = {}

    # ---- what TensorRT does on the same GPU ----

    def enqueue(self, work: Callable[[], None]) -> None:
        """Queues work on the stream, or records it where the stream is being captured."""
        (self._queue if self._capturing is None else self._capturing).append(work)

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The tensor at an address, which must lie in memory that is allocated."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        index = bisect.bisect_right(self._starts, address) - 1
        start = self._starts[index] if index >= 0 else 0
        assert index >= 0 and address + size <= start + self.live[start], "not in the device's memory"
        raw = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)

    def _bytes(self, address: int, size: int) -> np.ndarray:
        return self.array(address, (size,), np.uint8)

    # ---- the driver's functions ----

    def cuInit(self, flags: Any) -> int:  # noqa: N802
        return 0 if self.devices else NO_DEVICE

    def cuDeviceGet(self, device: Any, index: Any) -> int:  # noqa: N802
        return 0 if index.value < self.devices else 101

    def cuDeviceGetName(self, text: Any, size: Any, device: Any) -> int:  # noqa: N802
        text.value = b"Null GPU"
        return 0

    def cuDriverGetVersion(self, number: Any) -> int:  # noqa: N802
        number._obj.value = 12060
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: Any, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: self.sm[0], 76: self.sm[1], 18: int(self.integrated)}[number.value]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        context._obj.value = 0x11
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:  # noqa: N802
        self.log.append("release")
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        return 0 if context.value == 0x11 else INVALID

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:  # noqa: N802
        stream._obj.value = STREAM
        return 0

    def cuStreamDestroy_v2(self, stream: Any) -> int:  # noqa: N802
        return 0

    def cuGetErrorName(self, status: Any, text: Any) -> int:  # noqa: N802
        names = {INVALID: b"CUDA_ERROR_INVALID_VALUE", NO_DEVICE: b"CUDA_ERROR_NO_DEVICE"}
        text._obj.value = names.get(status.value, b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        return 0

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:  # noqa: N802
        if sum(self.live.values()) + size.value > self.memory:
            return OUT_OF_MEMORY
        raw = np.full(size.value + 256, 0xFF, np.uint8)  # what nobody cleared is no number
        address = -(-raw.ctypes.data // 256) * 256
        self.live[address], self._held[address] = size.value, raw
        bisect.insort(self._starts, address)
        pointer._obj.value = address
        return 0

    def cuMemFree_v2(self, pointer: Any) -> int:  # noqa: N802
        self._drain()
        del self.live[pointer.value], self._held[pointer.value]
        self._starts.remove(pointer.value)
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value, total._obj.value = self.memory - sum(self.live.values()), self.memory
        return 0

    def cuMemsetD8Async(self, target: Any, value: Any, size: Any, stream: Any) -> int:  # noqa: N802
        view, number = self._bytes(target.value, size.value), value.value
        self.enqueue(lambda: view.fill(number))
        return 0

    def cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        return self._over_the_bus("upload", self._bytes(target.value, size.value), _host(source, size))

    def cuMemcpyDtoHAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        return self._over_the_bus("download", _host(target, size), self._bytes(source.value, size.value))

    def _over_the_bus(self, what: str, target: np.ndarray, source: np.ndarray) -> int:
        if self._capturing is not None:
            self._invalid = True
            return CAPTURE_UNSUPPORTED
        setattr(self, f"{what}s", getattr(self, f"{what}s") + 1)
        self.log.append(what)
        self.enqueue(lambda: target.__setitem__(..., source))
        return 0

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        to, of = self._bytes(target.value, size.value), self._bytes(source.value, size.value)
        self.log.append("copy")
        self.enqueue(lambda: to.__setitem__(..., of))
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        if self._capturing is not None:
            self._invalid = True
            return CAPTURE_UNSUPPORTED
        self._drain()
        return 0

    def _drain(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:  # noqa: N802
        assert stream.value == STREAM and mode.value == 1
        self._capturing, self._invalid = [], False
        self.log.append("capture")
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:  # noqa: N802
        work, self._capturing = self._capturing, None
        if self._invalid:
            return CAPTURE_INVALIDATED
        assert work is not None
        graph._obj.value = len(self._graphs) + 1
        self._graphs[len(self._graphs) + 1] = work
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:  # noqa: N802
        executable._obj.value = graph.value
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:  # noqa: N802
        self.log.append(f"launch {executable.value}")
        self._queue += self._graphs[executable.value]
        return 0

    def cuGraphExecDestroy(self, executable: Any) -> int:  # noqa: N802
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:  # noqa: N802
        return 0


def _host(pointer: Any, size: Any) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * size.value).from_address(pointer.value), np.uint8)


class NullTensorRT:
    """Behaves like the module tensorrt on a `NullCuda`.

    Attributes:
        loads: How often an engine was deserialized.
        contexts: Every execution context that was made.
        libraries: Plugins that can be registered.
    """

    class ILogger:
        class Severity:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class TensorIOMode:
        NONE, INPUT, OUTPUT = range(3)

    class TensorLocation:
        DEVICE, HOST = range(2)

    class ExecutionContextAllocationStrategy:
        STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)

    def __init__(self, cuda: NullCuda, version: str = "10.3.0", *, capturable: bool = True) -> None:
        self.cuda, self.__version__, self.capturable = cuda, version, capturable
        self.loads = 0
        self.libraries: set[str] = set()
        self.contexts: list[NullContext] = []

    def nptype(self, dtype: str) -> Any:
        return np.dtype(dtype).type

    def get_plugin_registry(self) -> Any:
        return self

    def load_library(self, path: str) -> object | None:
        return object() if path in self.libraries else None

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return NullRuntime(self, logger)


class NullRuntime:
    def __init__(self, module: NullTensorRT, logger: Any) -> None:
        self._module, self._logger = module, logger

    def deserialize_cuda_engine(self, data: Any) -> NullEngine:
        self._module.loads += 1
        return NullEngine(self._module, json.loads(bytes(data)))


class NullEngine:
    def __init__(self, module: NullTensorRT, said: dict[str, Any]) -> None:
        self.module = module
        self.graph: str = said["graph"]
        self.session = onnxruntime.InferenceSession(self.graph)
        self.shapes = {name: tuple(shape) for name, shape in said["shapes"].items()}
        self.reads = [i.name for i in self.session.get_inputs()]
        self.types = {name: said["dtypes"][name] for name in self.shapes}
        self.device_memory_size_v2: int = said["scratch"]
        self.num_io_tensors = len(self.shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_dtype(self, name: str) -> str:
        return str(self.types[name])

    def get_tensor_mode(self, name: str) -> int:
        mode = self.module.TensorIOMode
        return mode.INPUT if name in self.reads else mode.OUTPUT

    def get_tensor_location(self, name: str) -> int:
        return self.module.TensorLocation.DEVICE

    def create_execution_context(self, strategy: int) -> NullContext:
        assert strategy == self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        context = NullContext(self)
        self.module.contexts.append(context)
        return context


class NullContext:
    def __init__(self, engine: NullEngine) -> None:
        self.engine = engine
        self.scratch: tuple[int, int] | None = None
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        engine, cuda = self.engine, self.engine.module.cuda
        assert stream == STREAM
        if self.scratch is not None:
            cuda.array(self.scratch[0], (self.scratch[1],), np.uint8)  # is it still there
        if not engine.module.capturable and cuda._capturing is not None:
            cuda._invalid = True
            return False
        arrays = {
            name: cuda.array(self.addresses[name], shape, engine.types[name])
            for name, shape in engine.shapes.items()
        }

        def compute() -> None:
            feeds = {name: arrays[name].copy() for name in engine.reads}
            names = [name for name in arrays if name not in engine.reads]
            for name, value in zip(names, engine.session.run(names, feeds), strict=True):
                arrays[name][...] = value

        cuda.log.append(f"run {Path(engine.graph).stem}")
        cuda.enqueue(compute)
        return True
