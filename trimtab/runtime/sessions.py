"""Loaded engines. Each backend is imported here and nowhere else in the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trimtab.errors import BundleError, MissingDependency, TargetError

Buffer = npt.NDArray[Any]
"""A contiguous array in the memory of the backend's device. (Today: the CPU's.)"""

Run = Callable[[], None]
"""Runs an engine on the buffers that it was bound to."""


class Session(Protocol):
    """One loaded engine; a context manager that lets go of it."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        """Binds buffers, which are read and written in place at every run.

        Args:
            inputs: Graph input -> buffer of its dtype.
            outputs: Graph output -> buffer of its dtype and exact shape.
        """
        ...

    def close(self) -> None:
        """Lets go of the engine and its memory."""
        ...


class OnnxRuntimeSession:
    """An ONNX graph on ONNX Runtime's CPU provider.

    Args:
        graph: The file; its weights lie beside it.
        threads: Threads for one operator; 0 for one a core.
        fold: Compute once, at load, what depends on nothing but weights. Packed weights would be decoded then, and
            take the memory of dense ones.

    Raises:
        MissingDependency: onnxruntime is not installed.
        BundleError: The graph cannot be loaded.
    """

    def __init__(self, graph: Path, threads: int = 0, fold: bool = True) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependency("onnxruntime", "gpu") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # its errors are raised below, and are not printed as well
        try:
            self._session = onnxruntime.InferenceSession(
                graph,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=None if fold else ["ConstantFolding"],
            )
        except Exception as error:  # onnxruntime's errors share no base
            reason = str(error).strip().splitlines()[0]
            raise BundleError(
                f"{graph} cannot be loaded by onnxruntime {onnxruntime.__version__}: {reason}"
            ) from error

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        session = self._session
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        held = (tuple(inputs.values()), tuple(outputs.values()))  # the binding only knows addresses

        def run(_held: Any = held) -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
                raise TargetError(f"onnxruntime failed: {reason}") from error

        return run

    def close(self) -> None:
        del self._session

    def __enter__(self) -> OnnxRuntimeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


BACKENDS: Mapping[str, Callable[[Path, int, bool], Session]] = {"onnxruntime": OnnxRuntimeSession}
"""Backend -> how its engine is loaded: from a file, with a number of CPU threads, decoding weights at load or not."""


def new_buffer(shape: tuple[int, ...], dtype: str) -> Buffer:
    """A buffer of zeros: what is read before it is written must at least be finite."""
    return np.zeros(shape, dtype)
