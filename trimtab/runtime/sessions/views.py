"""Inputs and outputs of an ONNX graph that lie in one buffer: see `trimtab.manifest.VIEWS`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trimtab.errors import BundleError
from trimtab.manifest import VIEWS

_TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class _View(NamedTuple):
    name: str
    dtype: type[np.generic]
    shape: tuple[int, ...]


class Views:
    """The views that a graph asks for, none as a rule.

    Args:
        session: ONNX Runtime's.
        graph: Its file, for messages.

    Raises:
        BundleError: One is of another type, or of an open size.
    """

    def __init__(self, session: Any, graph: Path) -> None:
        self._read = _named(session.get_inputs(), graph)
        self._written = _named(session.get_outputs(), graph)

    @property
    def bytes(self) -> int:
        """Of the buffer."""
        views = (*self._read, *self._written)
        return max((math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in views), default=0)

    def bind(self, binding: Any, device: str, address: int) -> None:
        """Lays all views at one address of a device's memory."""
        for bind, views in ((binding.bind_input, self._read), (binding.bind_output, self._written)):
            for view in views:
                bind(view.name, device, 0, view.dtype, view.shape, address)


def _named(specs: Any, graph: Path) -> tuple[_View, ...]:
    views = []
    for spec in specs:
        if spec.name.startswith(VIEWS):
            if (
                spec.type not in _TYPES
                or not spec.shape
                or not all(isinstance(size, int) and size > 0 for size in spec.shape)
            ):
                raise BundleError(
                    f"{graph} has {spec.name} as {spec.type} {spec.shape}, which is no view of a packed weight: "
                    "compile the bundle again"
                )
            views.append(_View(spec.name, _TYPES[spec.type], tuple(spec.shape)))
    return tuple(views)
