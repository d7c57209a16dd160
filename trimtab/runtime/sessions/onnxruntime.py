"""ONNX Runtime, on the CPU and on CUDA. Its engines are the graphs themselves."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import BundleError, MissingDependency, TargetError, first_line
from trimtab.manifest import Engine
from trimtab.runtime.sessions.base import Buffer, Run, in_turn
from trimtab.runtime.sessions.cuda import Driver
from trimtab.runtime.sessions.device_array import DeviceArray
from trimtab.runtime.sessions.views import Views

Provider = str | tuple[str, Mapping[str, str]]


_UNFOLDED = ["ConstantFolding", "ConvAddActivationFusion"]
"""What a graph with packed weights is not optimised by. The second loses the output of a convolution whose weight is no
constant, where the graph gives it to others as well (onnxruntime 1.32)."""


GPU_PACKAGE = (
    "run pip uninstall -y onnxruntime onnxruntime-gpu, and then pip install 'onnxruntime-gpu[cuda,cudnn]': both "
    "write one module, and where both are installed the last one stays"
)
"""No extra of trimtab's can say that: it needs onnxruntime, which onnxruntime-gpu takes the place of."""

_M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""

_MAPPED_BYTES = 1 << 18
"""Twice what glibc begins with: a call of the kernel is little beside the work on so many bytes."""


def cuda_provider(stream: int, tf32: bool = False) -> Provider:
    """ONNX Runtime's CUDA provider on a stream of ours.

    The arena grows by what is asked for and not to the next power of two, which may be twice as much.

    Args:
        stream: Its handle.
        tf32: Whether products may keep 10 bits of 23: a bundle of fp32 promises fp32.
    """
    return (
        "CUDAExecutionProvider",
        {
            "device_id": "0",
            "user_compute_stream": str(stream),
            "use_tf32": str(int(tf32)),
            "arena_extend_strategy": "kSameAsRequested",
        },
    )


def import_onnxruntime() -> Any:
    """The package onnxruntime, which is told not to report to its makers what is run with it.

    From 1.29 on it else keeps an identifier of the machine in ``~/.cache/Microsoft`` and sends events over the network.
    It asks as it is imported: whoever imports it before, or has set the variable, decides for themselves.

    Raises:
        MissingDependency: It is not installed.
        TargetError: It is, and cannot be loaded.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependency("onnxruntime", "", "run pip install onnxruntime") from error
    except (ImportError, OSError) as error:  # a library of its own that is not there
        raise TargetError(f"onnxruntime cannot be loaded ({error}): install it again") from error
    return onnxruntime


class OnnxRuntimeSession:
    """An ONNX graph on one of ONNX Runtime's providers.

    Args:
        graph: The file; its weights lie beside it.
        threads: CPU threads for one operator; 0 for one a core.
        provider: Who runs it.
        device: ONNX Runtime's name of the memory that buffers lie in: "cpu" or "cuda".
        fold: Compute once, at load, what depends on nothing but weights. Packed weights would be decoded then, and
            take the memory of dense ones.
        lean: Take less memory and more time: weights are used where they lie, and not laid out anew.
        optimise: Fuse operators and choose layouts, also of weights. Without, a graph of a gigabyte loads in a third of
            a second.
        new: Makes a buffer in that memory; on the CPU, where it is left out.

    Raises:
        MissingDependency: onnxruntime is not installed.
        TargetError: It is, and cannot be loaded; or the provider cannot be used on this machine.
        BundleError: The graph cannot be loaded.
    """

    def __init__(
        self,
        graph: Path,
        threads: int = 0,
        provider: Provider = "CPUExecutionProvider",
        device: str = "cpu",
        fold: bool = True,
        *,
        lean: bool = False,
        optimise: bool = True,
        new: Callable[[tuple[int, ...], str], Buffer] = np.zeros,
    ) -> None:
        onnxruntime = import_onnxruntime()
        name = provider if isinstance(provider, str) else provider[0]
        if name not in onnxruntime.get_available_providers():
            raise TargetError(f"onnxruntime {onnxruntime.__version__} has no {name}: {GPU_PACKAGE}")
        if name == "CUDAExecutionProvider":
            # Each session would warn of a plugin that nobody asked for.
            onnxruntime.set_default_logger_severity(3)
            if hasattr(onnxruntime, "preload_dlls"):
                onnxruntime.preload_dlls()  # CUDA and cuDNN from NVIDIA's wheels, where those are installed
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # A plan of all buffers is allocated at the second run, beside what the arena kept of the first one: for Stable
        # Diffusion 1.5's U-Net 0.78 GB more, and not faster.
        options.enable_mem_pattern = False
        # A buffer that is planned for several tensors of one size is held from the first to the last of them: half a
        # gigabyte of that U-Net's peak, for no time that could be measured.
        options.enable_mem_reuse = False
        if lean:
            _map_large_buffers()
            options.enable_cpu_mem_arena = False
        if lean or not optimise:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # its errors are raised below, and are not printed as well
        providers = [provider] if device == "cpu" else [provider, "CPUExecutionProvider"]
        try:
            self._session = onnxruntime.InferenceSession(
                graph,
                options,
                providers=providers,
                disabled_optimizers=None if fold else _UNFOLDED,
                enable_fallback=0,  # it prints to stdout, and tries again with what failed
            )
        except Exception as error:  # onnxruntime's errors share no base
            raise BundleError(
                f"{graph} cannot be loaded by onnxruntime {onnxruntime.__version__}: {first_line(error)}"
            ) from error
        # Where a provider's libraries are missing, onnxruntime goes on without it and says nothing.
        if name not in self._session.get_providers():
            raise TargetError(
                f"onnxruntime {onnxruntime.__version__} cannot start its {name}: install the CUDA and cuDNN that "
                "it was built for (pip install 'onnxruntime-gpu[cuda,cudnn]')"
            )
        self._graph = graph
        self._device = device
        self._new = new
        self._views = Views(self._session, graph)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        """See `trimtab.runtime.sessions.Session`."""
        session = self._session
        binding = session.io_binding()
        for bind, buffers in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                try:
                    bind(name, self._device, 0, buffer.dtype.type, buffer.shape, _address(buffer))
                except Exception as error:
                    raise BundleError(
                        f"{self._graph} cannot be given {name} ({first_line(error)}): compile the bundle again"
                    ) from error
        held = [*inputs.values(), *outputs.values()]  # the binding only knows addresses
        if self._views.bytes:
            shared = self._new((self._views.bytes,), "uint8")
            self._views.bind(binding, self._device, _address(shared))
            held.append(shared)

        def run(_held: Any = held) -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise TargetError(f"onnxruntime failed: {first_line(error)}") from error

        return run

    def close(self) -> None:
        """Lets go of the graph and its weights."""
        del self._session


def _map_large_buffers() -> None:
    """Has glibc give large buffers pages of their own, for the whole process, which go back as soon as they are freed.

    It would learn from the first that are freed to take up to 32 MiB from its heap, where holes between them stay.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def _address(buffer: Buffer) -> int:
    if isinstance(buffer, np.ndarray):
        return int(buffer.ctypes.data)
    assert isinstance(buffer, DeviceArray)
    return buffer.address


class OnnxRuntimeCpu:
    """The default that works everywhere. Buffers are numpy arrays.

    Args:
        threads: Threads for one operator; 0 for one a core.
        fast: Decode packed weights once, at load.
        lean: As `OnnxRuntimeSession` takes it.
    """

    def __init__(self, threads: int = 0, fast: bool = False, lean: bool = False) -> None:
        self._threads = threads
        self._fast = fast
        self._lean = lean

    def new(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `trimtab.runtime.sessions.Backend`."""
        try:
            return np.zeros(shape, dtype)
        except (MemoryError, ValueError, OverflowError):  # beyond what is free, or what can be addressed
            sizes = "x".join(map(str, shape))
            raise TargetError(
                f"there is no memory for a tensor of {sizes:.100} {dtype}: choose a smaller size or batch"
            ) from None

    def check(self, engine: Engine) -> None:
        """A graph is bound to no device and no version."""

    def file(self, engine: Engine) -> str:
        """See `trimtab.runtime.sessions.Backend`.

        To decode packed weights at load it takes the graph before they were made to wait for an activation: of open
        sizes, ONNX Runtime folds nothing that waits.
        """
        return engine.graph if self._fast and engine.packed else engine.path

    def load(self, engine: Engine, path: Path, plugins: Sequence[Path] = ()) -> OnnxRuntimeSession:
        """See `trimtab.runtime.sessions.Backend`."""
        if self._fast and engine.packed:
            _map_large_buffers()  # every stage of decoding is a copy of all weights, and none goes back otherwise
        return OnnxRuntimeSession(
            path, self._threads, fold=self._fast or not engine.packed, lean=self._lean, new=self.new
        )

    def fused(self, runs: Sequence[Run]) -> Run:
        """See `trimtab.runtime.sessions.Backend`."""
        return in_turn(runs)

    def synchronize(self) -> None:
        """Every run has ended when it returns."""

    def close(self) -> None:
        """Nothing is held."""


class OnnxRuntimeCuda:
    """The same graphs on an NVIDIA GPU. Buffers stay in its memory from call to call.

    Its runs are not captured as CUDA graphs: ONNX Runtime waits at the end of each, which a capture forbids.

    Args:
        driver: The GPU.
        provider: ONNX Runtime's; `cuda_provider` on the driver's stream by default.
        device: ONNX Runtime's name of the driver's memory.
        fast: Products in TF32, as torch takes them for convolutions: half the time of Stable Diffusion 1.5's step on an
            H100, and 8e-4 of its largest value off.
    """

    def __init__(
        self, driver: Driver, provider: Provider | None = None, device: str = "cuda", *, fast: bool = False
    ) -> None:
        self._driver = driver
        self._provider = provider or cuda_provider(driver.stream, tf32=fast)
        self._device = device

    def new(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """See `trimtab.runtime.sessions.Backend`."""
        return DeviceArray(self._driver, shape, dtype)

    def check(self, engine: Engine) -> None:
        """A graph is bound to no device and no version."""

    def file(self, engine: Engine) -> str:
        """The graph before it was changed for the CPU, where both compute the same.

        The CPU's may go by parts of an attention's queries: Stable Diffusion 1.5's U-Net then took 1.3 times as long on
        an H100 (docs/hardware.md).
        """
        return engine.graph if engine.precision == "fp32" and not engine.packed else engine.path

    def load(self, engine: Engine, path: Path, plugins: Sequence[Path] = ()) -> OnnxRuntimeSession:
        """See `trimtab.runtime.sessions.Backend`."""
        return OnnxRuntimeSession(path, 0, self._provider, self._device, fold=not engine.packed, new=self.new)

    def fused(self, runs: Sequence[Run]) -> Run:
        """See `trimtab.runtime.sessions.Backend`."""
        return in_turn(runs)

    def synchronize(self) -> None:
        """See `trimtab.runtime.sessions.Backend`."""
        self._driver.synchronize()

    def close(self) -> None:
        """Lets go of the GPU."""
        self._driver.close()
