"""Weights beside the graphs: one file a segment, every distinct tensor once over all segments.

Graphs and weight files share one folder, since ONNX Runtime refuses external data that lies elsewhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from trimtab.passes.vq_op import is_packed

INLINE_BYTES = 1024
"""Smaller tensors stay in the graph: shapes and axes must be readable there by every parser."""

_ALIGN = 64
"""Bytes: a cache line, and what ONNX Runtime wants of a tensor that it maps instead of copies."""

_CHUNK = 1 << 24
"""Bytes hashed and written at a time."""


def fingerprint(arrays: Iterable[tuple[str, npt.NDArray[Any]]]) -> str:
    """SHA-256 over the names, dtypes, shapes and values of arrays, in hexadecimal."""
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class WeightStore:
    """Writes the initializers of graphs into files of one folder, each distinct tensor once.

    Args:
        folder: Holds the ``.weights`` files; must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[tuple[bytes, str, tuple[int, ...]], tuple[str, int, int]] = {}

    def keep(self, name: str, model: ir.Model) -> ir.Model:
        """Moves a graph's large initializers into ``NAME.weights`` and maps them from there.

        Tensors that the store already holds, of this or another graph, are referred to and not written again.

        Args:
            name: The segment.
            model: Edited in place.

        Returns:
            The same model.
        """
        path = self.folder / f"{name}.weights"
        with path.open("ab") as stream:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < INLINE_BYTES or self._holds(tensor):
                    continue
                shape = tuple(tensor.shape.numpy())
                data = _bytes(tensor)
                key = (hashlib.sha256(data).digest(), tensor.dtype.name, shape)
                if key not in self._where:
                    stream.write(b"\0" * (-stream.tell() % _ALIGN))
                    self._where[key] = (path.name, stream.tell(), len(data))
                    for start in range(0, len(data), _CHUNK):
                        stream.write(data[start : start + _CHUNK])
                location, offset, length = self._where[key]
                value.const_value = ir.ExternalTensor(
                    location,
                    offset,
                    length,
                    tensor.dtype,
                    shape=ir.Shape(shape),
                    name=value.name or "",
                    base_dir=self.folder,
                )
        if path.stat().st_size == 0:
            path.unlink()
        return model

    def _holds(self, tensor: ir.TensorProtocol) -> bool:
        return isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir) == self.folder

    def compact(self, models: dict[str, ir.Model]) -> None:
        """Rewrites the files if passes have left more than a hundredth of their bytes without a reader.

        Args:
            models: Every graph that the store serves, by segment.
        """
        live: dict[tuple[str, int], int] = {}
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor) and self._holds(tensor):
                    live[str(tensor.location), tensor.offset or 0] = tensor.nbytes
        files = sorted(self.folder.glob("*.weights"))
        total = sum(file.stat().st_size for file in files)
        if total == 0 or sum(live.values()) >= 0.99 * total:
            return
        fresh = self.folder / "compact"
        fresh.mkdir()
        other = WeightStore(fresh)
        for name, model in models.items():
            other.keep(name, model)
        for file in files:
            file.unlink()
        for file in fresh.iterdir():
            file.rename(self.folder / file.name)
        fresh.rmdir()
        self._where = other._where
        for model in models.values():
            ir.external_data.set_base_dir(model.graph, self.folder)


def _bytes(tensor: ir.TensorProtocol) -> memoryview:
    """A tensor's raw little-endian bytes, without a copy where numpy allows one to be avoided."""
    if tensor.dtype.bitwidth < 8:
        return memoryview(tensor.tobytes())
    array = np.ascontiguousarray(tensor.numpy())
    return memoryview(array.reshape(-1).view(np.uint8).data)


def load_model(file: Path) -> ir.Model:
    """A graph whose tensors in files all have its folder.

    `onnx_ir.load` leaves it out for those of functions, and onnx_ir then reads whatever path they name.
    """
    model = ir.load(file)
    for tensor in external_tensors(model):
        tensor.base_dir = file.parent
    return model


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every tensor of a model that lies in a file: weights and attributes, those of functions and subgraphs too."""
    yield from _external(model.graph)
    for function in model.functions.values():
        yield from _external(function.graph)
        yield from _external_attributes(function.attributes.values())


def _external(graph: ir.Graph) -> Iterator[ir.ExternalTensor]:
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value
    for node in graph:
        yield from _external_attributes(node.attributes.values())


def _external_attributes(attributes: Iterable[ir.Attr]) -> Iterator[ir.ExternalTensor]:
    for attribute in attributes:
        whole = attribute.value
        for part in whole if isinstance(whole, list | tuple) else (whole,):
            if isinstance(part, ir.ExternalTensor):
                yield part
            elif isinstance(part, ir.Graph):
                yield from _external(part)


def parameter_count(model: ir.Model) -> int:
    """Elements of all floating-point weights with more than one element; packed ones count as what they decode to."""
    packed = [node for node in model.graph if is_packed(node)]
    parts = {value for node in packed for value in node.inputs}
    return sum(
        v.const_value.size
        for v in model.graph.initializers.values()
        if v.const_value is not None
        and v.const_value.dtype.is_floating_point()
        and v.const_value.size > 1
        and v not in parts
    ) + sum(math.prod(node.attributes.get_ints("shape", ())) for node in packed)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers; what several of them share in a `WeightStore` counts once."""
    again = repeated(model)
    return sum(_nbytes(value) for name, value in model.graph.initializers.items() if name not in again)


def repeated_bytes(model: ir.Model) -> int:
    """Bytes that `weight_bytes` leaves out."""
    return sum(_nbytes(model.graph.initializers[name]) for name in repeated(model))


def repeated(model: ir.Model) -> frozenset[str]:
    """Initializers that lie where another one before them does, in a file or in memory."""
    seen: set[object] = set()
    again = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        place = (str(tensor.path), tensor.offset) if isinstance(tensor, ir.ExternalTensor) else id(tensor)
        if place in seen:
            again.append(name)
        seen.add(place)
    return frozenset(again)


def _nbytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def same_tensor(first: ir.TensorProtocol | None, second: ir.TensorProtocol | None) -> bool:
    """Whether two tensors hold the same numbers; they are read where they are not one object."""
    if first is second or first is None or second is None:
        return first is second
    return same_numbers(first.numpy(), second.numpy())


def same_numbers(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> bool:
    """Whether two arrays hold the same numbers, which are read only where they are not the same memory."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    places = {(array.__array_interface__["data"][0], array.strides) for array in (first, second)}
    return len(places) == 1 or np.array_equal(first, second, equal_nan=np.issubdtype(first.dtype, np.inexact))
