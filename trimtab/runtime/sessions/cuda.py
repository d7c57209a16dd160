"""The CUDA driver, as far as trimtab needs it: memory, one stream, graphs.

It is called through ctypes. libcuda comes with every driver, on desktops and on Jetsons, and its symbols do not
change; cuda-python must fit the CUDA version, and libcudart may be installed nowhere, since TensorRT for RTX and
ONNX Runtime bring their own.
"""

from __future__ import annotations

import ctypes
import logging
import math
import sys
import threading
from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import TargetError
from trimtab.runtime.sessions.base import Run, in_turn

logger = logging.getLogger(__name__)

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# From cuda.h.
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no implicit waiting for the default stream
_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_SM_MAJOR, _SM_MINOR, _INTEGRATED = (
    75,
    76,
    18,
)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR, _INTEGRATED


class Driver:
    """The first GPU's primary context, which the CUDA runtimes of TensorRT and ONNX Runtime share, and one stream.

    Args:
        library: libcuda, or what behaves like it.

    Attributes:
        sm: Compute capability, such as "8.7".
        name: What the GPU calls itself.
        integrated: The GPU lives in the CPU's memory, as on a Jetson.
        version: The highest CUDA version that the driver serves, such as "12.6".
        stream: Handle of the stream that everything runs on.

    Raises:
        TargetError: There is no NVIDIA driver, or no GPU.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = _open() if library is None else library
        self._current = threading.local()
        self._context: c_void_p | None = None
        self._call("cuInit", c_uint(0))
        device, text, number = c_int(), ctypes.create_string_buffer(256), c_int()
        self._call("cuDeviceGet", byref(device), c_int(0))
        self._call("cuDeviceGetName", text, c_int(len(text)), device)
        self._call("cuDriverGetVersion", byref(number))
        self._device = device
        self.name = text.value.decode(errors="replace")
        self.version = f"{number.value // 1000}.{number.value % 1000 // 10}"
        self.sm = f"{self._attribute(_SM_MAJOR)}.{self._attribute(_SM_MINOR)}"
        self.integrated = bool(self._attribute(_INTEGRATED))
        context, stream = c_void_p(), c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        self._context = context
        self._call("cuStreamCreate", byref(stream), c_uint(_NON_BLOCKING))
        self.stream = int(stream.value or 0)

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), c_int(number), self._device)
        return value.value

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes, aligned to 256 at least, not initialised.

        Raises:
            TargetError: There is no room.
        """
        if size >= 2**63:  # beyond 2**64 a c_size_t begins at 0 again
            raise self._full(size)
        pointer = c_void_p()
        self._call("cuMemAlloc_v2", byref(pointer), c_size_t(max(size, 1)), wanted=size)
        return int(pointer.value or 0)

    def free(self, address: int) -> None:
        """Gives memory back, after everything that was queued."""
        self._call("cuMemFree_v2", c_void_p(address))

    def clear(self, address: int, size: int) -> None:
        """Writes zeros."""
        if size:
            self._call("cuMemsetD8Async", c_void_p(address), ctypes.c_ubyte(0), c_size_t(size), self._stream)

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copies a contiguous array from the host, and waits: the array may be changed afterwards."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            c_void_p(address),
            c_void_p(array.ctypes.data),
            c_size_t(array.nbytes),
            self._stream,
        )
        self.synchronize()

    def download(self, array: npt.NDArray[Any], address: int) -> None:
        """Copies to a contiguous array of the host, and waits for everything that was queued before."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            c_void_p(array.ctypes.data),
            c_void_p(address),
            c_size_t(array.nbytes),
            self._stream,
        )
        self.synchronize()

    def copy(self, target: int, source: int, size: int) -> None:
        """Queues a copy within the device."""
        self._call("cuMemcpyDtoDAsync_v2", c_void_p(target), c_void_p(source), c_size_t(size), self._stream)

    def synchronize(self) -> None:
        """Waits for everything that was queued."""
        self._call("cuStreamSynchronize", self._stream)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device; on a Jetson ``free`` leaves out what the system would give back."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def capture(self, run: Callable[[], None]) -> Graph:
        """Records what ``run`` queues, without executing it.

        Raises:
            TargetError: Something in it cannot be captured. The stream is usable again.
        """
        graph, executable = c_void_p(), c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, c_int(_CAPTURE_THREAD_LOCAL))
        try:
            run()
        except BaseException:
            self._library.cuStreamEndCapture(self._stream, byref(graph))  # its error would hide the reason
            if graph.value:
                self._call("cuGraphDestroy", graph)
            raise
        self._call("cuStreamEndCapture", self._stream, byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", byref(executable), graph, c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)
        return Graph(self, executable)

    def close(self) -> None:
        """Lets go of the stream and the context."""
        if self._context is not None:
            self._call("cuStreamDestroy_v2", self._stream)
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)
            self._context = None

    @property
    def closed(self) -> bool:
        """Whether the context was let go of, and all memory with it."""
        return self._context is None

    @property
    def _stream(self) -> c_void_p:
        return c_void_p(self.stream)

    def _call(self, name: str, *arguments: Any, wanted: int | None = None) -> None:
        if self._context is not None and not getattr(self._current, "set", False):
            self._current.set = True  # a context is current in one thread
            self._call("cuCtxSetCurrent", self._context)
        status = int(getattr(self._library, name)(*arguments))
        if status == 0:
            return
        if status == _OUT_OF_MEMORY:
            raise self._full(wanted)
        text = c_char_p()
        self._library.cuGetErrorName(c_int(status), byref(text))
        reason = text.value.decode() if text.value else f"error {status}"
        if name in ("cuInit", "cuDeviceGet"):
            raise TargetError(
                f"the NVIDIA driver finds no GPU that it can use ({reason} from {name}): see that nvidia-smi lists "
                "one, or run on the CPU: --target cpu, and no --provider"
            )
        raise TargetError(f"the GPU failed ({reason} from {name}): restart the program, then the machine")

    def _full(self, wanted: int | None) -> TargetError:
        asked = f"{wanted >> 20} MiB more were" if wanted is not None else "more was"
        return TargetError(
            f"the memory of {self.name} is full and {asked} needed: close other programs, ask for a smaller "
            "size, or load with --low-memory"
        )


class Graph:
    """A captured sequence that can be launched again and again."""

    def __init__(self, driver: Driver, executable: c_void_p) -> None:
        self._driver = driver
        self._executable = executable

    def launch(self) -> None:
        """Queues everything that was captured."""
        self._driver._call("cuGraphLaunch", self._executable, self._driver._stream)

    def __del__(self) -> None:
        if not self._driver.closed:
            self._driver._call("cuGraphExecDestroy", self._executable)


class Captured:
    """Several runs as one: plainly the first time, as engines set themselves up then, and as a CUDA graph after.

    What cannot be captured goes on running plainly.

    Args:
        driver: Whose stream the runs queue on.
        runs: In order. What they read and write stays where it is.
        generation: Changes when something that a capture would hold has moved: it is made anew then.
    """

    def __init__(self, driver: Driver, runs: Sequence[Run], generation: Callable[[], int]) -> None:
        self._driver = driver
        self._run = in_turn(runs)
        self._generation = generation
        self._warm: int | None = None
        self._graph: Graph | None = None
        self._plain = False

    def __call__(self) -> None:
        now = self._generation()
        if self._plain or self._warm != now:
            self._graph = None
            self._run()
            self._warm = now
            return
        if self._graph is None:
            try:
                self._graph = self._driver.capture(self._run)
            except TargetError as error:
                logger.info("no CUDA graph is used, as the engines cannot be captured: %s", error)
                self._plain = True
                self._run()
                return
        self._graph.launch()


def _open() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise TargetError(
            f"there is no NVIDIA driver here ({error}): install one, or run on the CPU: --target cpu, "
            "and no --provider"
        ) from None
    return library


def element_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of a contiguous tensor, however large."""
    return math.prod(map(int, shape)) * dtype.itemsize
