"""What the executor knows of a backend: buffers in its memory, loaded engines, and nothing of how it does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trimtab.manifest import Engine

ALIGNMENT = 256
"""Bytes: what TensorRT's IExecutionContext::setTensorAddress asks of every address."""


class Buffer(Protocol):
    """A contiguous tensor in the memory of a backend's device.

    On the CPU it is a numpy array. Elsewhere it behaves like one in these ways and no others: it is written by
    assignment (``buffer[...] = array``), it is read by ``np.asarray(buffer)``, and each of the two is one copy
    over the bus that is seen where it stands. An index of the first axis is a view.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ndim(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def __setitem__(self, index: Any, value: Any, /) -> None: ...

    def __array__(self, dtype: Any = None, /, *, copy: bool | None = None) -> npt.NDArray[Any]: ...

    def copy(self) -> npt.NDArray[Any]:
        """A copy on the host."""
        ...

    def view(self, dtype: Any, /) -> Any: ...

    def reshape(self, shape: tuple[int, ...], /) -> Any: ...


Run = Callable[[], None]
"""Runs an engine on the buffers that it was bound to; on a GPU it returns once the work is queued."""


class Session(Protocol):
    """One loaded engine."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Run:
        """Binds buffers, which are read and written in place at every run.

        Args:
            inputs: Graph input -> buffer of its dtype.
            outputs: Graph output -> buffer of its dtype and exact shape.

        Raises:
            InputError: The engine was built for other shapes.
        """
        ...

    def close(self) -> None:
        """Lets go of the engine and its memory."""
        ...


class Backend(Protocol):
    """One runtime on one device; lives as long as the pipeline that runs on it."""

    def new(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer of zeros: what is read before it is written must at least be finite.

        Raises:
            TargetError: The device has no room for it.
        """
        ...

    def check(self, engine: Engine) -> None:
        """Says early and in words what would fail late and without any, before anything of the engine is read.

        Raises:
            WrongDevice: It was built for another device or version.
        """
        ...

    def file(self, engine: Engine) -> str:
        """The file that it loads for an engine, relative to the bundle."""
        ...

    def load(self, engine: Engine, path: Path, plugins: Sequence[Path] = ()) -> Session:
        """Loads an engine, checked first.

        Args:
            engine: What the bundle says of it.
            path: The file that `file` named, verified.
            plugins: Files to register before it is loaded, verified.

        Raises:
            WrongDevice: As in `check`.
            TargetError: The backend cannot load it.
            BundleError: The file is no engine.
        """
        ...

    def fused(self, runs: Sequence[Run]) -> Run:
        """One run for several in order: as one CUDA graph where the backend can capture them."""
        ...

    def synchronize(self) -> None:
        """Returns once everything that was queued is done."""
        ...

    def close(self) -> None:
        """Lets go of the device. Sessions are closed before, buffers must not be used after."""
        ...


def in_turn(runs: Sequence[Run]) -> Run:
    """One run for several in order, one after the other."""
    if len(runs) == 1:
        return runs[0]
    kept = tuple(runs)

    def run() -> None:
        for each in kept:
            each()

    return run
