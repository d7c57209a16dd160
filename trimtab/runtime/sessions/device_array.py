"""Tensors in a GPU's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.runtime.sessions.cuda import Driver, element_bytes


class _Allocation:
    """Memory that goes when the last tensor in it does."""

    def __init__(self, driver: Driver, size: int) -> None:
        self._driver = driver
        self.address = driver.allocate(size)
        driver.clear(self.address, size)

    def __del__(self) -> None:
        if hasattr(self, "address") and not self._driver.closed:
            self._driver.free(self.address)


class DeviceArray:
    """A contiguous tensor on a GPU, a `trimtab.runtime.sessions.Buffer`.

    Args:
        driver: The GPU.
        shape: Sizes.
        dtype: A numpy dtype.
    """

    def __init__(self, driver: Driver, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.driver = driver
        self.shape = tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._allocation = _Allocation(driver, self.nbytes)
        self.address = self._allocation.address

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return element_bytes(self.shape, self.dtype)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without axes has no length")
        return self.shape[0]

    def __getitem__(self, index: Any) -> DeviceArray:
        """A view: ``[...]``, ``[k]``, ``[k, ...]`` or ``[a:b]`` of the first axis."""
        if index is Ellipsis:
            return self
        if isinstance(index, tuple) and len(index) == 2 and index[1] is Ellipsis:
            index = index[0]
        if not self.shape or not isinstance(index, int | np.integer | slice):
            raise IndexError(f"{index!r} is no index of a tensor on a GPU: use [...], [k] or [a:b]")
        row = element_bytes(self.shape[1:], self.dtype)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise IndexError(f"{index!r} is no index of a tensor on a GPU: use [...], [k] or [a:b]")
            return self._at(start * row, (max(0, stop - start), *self.shape[1:]), self.dtype)
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"{index} is outside of the {len(self)} rows")
        return self._at(position * row, self.shape[1:], self.dtype)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Copies from the host, or within the GPU where ``value`` is a tensor on it."""
        target = self[index]
        if isinstance(value, DeviceArray):
            if value.shape != target.shape or value.dtype != target.dtype:
                raise ValueError(f"{value.dtype} {value.shape} does not fit {target.dtype} {target.shape}")
            self.driver.copy(target.address, value.address, target.nbytes)
            return
        array = np.broadcast_to(np.asarray(value, target.dtype), target.shape)
        self.driver.upload(target.address, np.ascontiguousarray(array))

    def __array__(self, dtype: Any = None, *, copy: bool | None = None) -> npt.NDArray[Any]:
        """A copy on the host, once everything that was queued is done."""
        if copy is False:
            raise ValueError("a tensor on a GPU is read by copying it")
        array = np.empty(self.shape, self.dtype)
        self.driver.download(array, self.address)
        return array if dtype is None else array.astype(dtype, copy=False)

    def copy(self) -> npt.NDArray[Any]:
        """A copy on the host."""
        return self.__array__()

    def view(self, dtype: npt.DTypeLike) -> DeviceArray:
        """The same bytes as another dtype; the last axis changes its length."""
        wanted = np.dtype(dtype)
        size = self.shape[-1] * self.dtype.itemsize
        if size % wanted.itemsize:
            raise ValueError(f"{size} bytes along the last axis are no whole number of {wanted}")
        return self._at(0, (*self.shape[:-1], size // wanted.itemsize), wanted)

    def reshape(self, shape: tuple[int, ...]) -> DeviceArray:
        """The same elements in another shape."""
        if element_bytes(shape, self.dtype) != self.nbytes:
            raise ValueError(f"{self.shape} cannot become {shape}")
        return self._at(0, tuple(shape), self.dtype)

    def _at(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        part = DeviceArray.__new__(DeviceArray)
        part.driver, part.shape, part.dtype = self.driver, shape, dtype
        part._allocation = self._allocation
        part.address = self.address + offset
        return part
