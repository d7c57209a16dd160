"""The key of an engine: everything that it was made from, as one hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trimtab.bundle import file_hash
from trimtab.errors import InputError
from trimtab.targets.base import Builder, BuildOptions
from trimtab.targets.device import Device
from trimtab.targets.hashing import on_all_cores

_FORMAT = "trimtab-graph-1"
"""Goes up when the walk below covers more or less, so that no old digest is taken for a new one."""


@dataclass(frozen=True)
class EngineKey:
    """Everything that an engine was made from. Plain data, so that it can be written beside the engine.

    Attributes:
        graph: `graph_digest` of the lowered graph: structure and weights.
        shapes: Graph input -> sizes.
        precision: Of the arithmetic.
        device: The fields of the device that decide the builder's engines.
        backend: Which runtime loads the engine.
        backend_version: Its exact version.
        options: All other fields of the options.
        plugins: SHA-256 of every plugin file, sorted.
    """

    graph: str
    shapes: Mapping[str, Any]
    precision: str
    device: Mapping[str, Any]
    backend: str
    backend_version: str
    options: Mapping[str, Any]
    plugins: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """The key as JSON holds it."""
        return {name: _plain(value, name) for name, value in vars(self).items()}

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hexadecimal: sorted names, no spaces, ASCII."""
        return hashlib.sha256(_canonical(self.plain())).hexdigest()


def engine_key(model: ir.Model, device: Device, options: BuildOptions, builder: Builder) -> EngineKey:
    """The key of the engine that ``builder`` would make.

    Args:
        model: The lowered graph.
        device: The target.
        options: A field that is added to them is part of the key by itself.
        builder: Says the backend and its version.

    Raises:
        InputError: An option is no plain data, or a plugin file cannot be read.
    """
    rest = {f.name: getattr(options, f.name) for f in fields(options)}
    return EngineKey(
        graph=graph_digest(model),
        shapes=_plain(rest.pop("shapes"), "shapes"),
        precision=rest.pop("precision"),
        device=_plain({name: getattr(device, name) for name in builder.device_fields}, "device"),
        backend=builder.backend,
        backend_version=builder.version,
        plugins=tuple(sorted(_plugin_hash(path) for path in rest.pop("plugins"))),
        options=_plain(rest, "options"),
    )


def graph_digest(model: ir.Model) -> str:
    """SHA-256 of what a graph computes and how it is bound, in hexadecimal.

    It covers operators, attributes, wiring, opsets, functions, every byte of every weight, and the names, types and
    shapes of inputs, outputs and initializers: those are what engines are bound and refitted by. It leaves out what
    can change while the computation stays: where weights are stored and in which order, metadata, doc strings, the
    names of nodes and of the values between them, and inferred shapes.

    Weights that lie in files are read in pieces and never held as a whole.
    """
    functions = sorted(model.functions.values(), key=lambda function: function.identifier())
    described = {
        "format": _FORMAT,
        "opsets": dict(model.opset_imports),
        "graph": _Walk().graph(model.graph),
        "functions": [
            {
                "identifier": function.identifier(),
                "opsets": dict(function.opset_imports),
                "attributes": [_Walk().attribute(attribute) for attribute in function.attributes.values()],
                "graph": _Walk().graph(function.graph, bound=False),
            }
            for function in functions
        ],
    }
    return hashlib.sha256(_canonical(described)).hexdigest()


def weights_digest(weights: Iterable[ir.Value]) -> str:
    """SHA-256 of the names, types, shapes and bytes of initializers, in hexadecimal; files are read in pieces."""
    known = {str(value.name): value.const_value for value in weights}
    described = dict(zip(known, on_all_cores(_tensor, known.values()), strict=True))
    return hashlib.sha256(_canonical(described)).hexdigest()


class _Walk:
    """Describes a graph and those inside it; values are known by where they come from, not by their names."""

    def __init__(self) -> None:
        self._origin: dict[ir.Value, str] = {}
        self._nodes = 0
        self._graphs = 0

    def graph(self, graph: ir.Graph, *, bound: bool = True) -> dict[str, Any]:
        """Describes one graph; only the outermost is bound by names, those inside are by position."""
        self._graphs += 1
        prefix = f"{self._graphs}:"
        for name, value in graph.initializers.items():
            self._origin[value] = f"{prefix}initializer:{name}"
        for index, value in enumerate(graph.inputs):
            self._origin[value] = f"{prefix}input:{index}"
        tensors = [value.const_value for value in graph.initializers.values()]
        return {
            "inputs": [_interface(value)[0 if bound else 1 :] for value in graph.inputs],
            "initializers": dict(zip(graph.initializers, on_all_cores(_tensor, tensors), strict=True)),
            "nodes": [self._node(node) for node in graph],
            "outputs": [[self._wire(value), _interface(value) if bound else None] for value in graph.outputs],
        }

    def _node(self, node: ir.Node) -> list[Any]:
        self._nodes += 1
        for index, value in enumerate(node.outputs):
            # An output without a name is one that the node is told not to make.
            self._origin[value] = f"{self._nodes}.{index}" if value.name != "" else ""
        return [
            node.op_identifier(),
            [self._wire(value) for value in node.inputs],
            [self._origin[value] for value in node.outputs],
            {name: self.attribute(attribute) for name, attribute in node.attributes.items()},
        ]

    def _wire(self, value: ir.Value | None) -> str | None:
        if value is None:
            return None
        return self._origin.get(value, f"outside:{value.name}")  # a graph that is not sorted, or is cut out

    def attribute(self, attribute: ir.Attr) -> list[Any]:
        kind, value = attribute.type, attribute.value
        described: Any
        if attribute.is_ref():
            described = ["ref", attribute.ref_attr_name]
        elif value is None or kind in (ir.AttributeType.INT, ir.AttributeType.INTS):
            described = value
        elif kind is ir.AttributeType.FLOAT:
            described = _floats([value])
        elif kind is ir.AttributeType.FLOATS:
            described = _floats(value)
        elif kind is ir.AttributeType.STRING:
            described = _text(value)
        elif kind is ir.AttributeType.STRINGS:
            described = [_text(v) for v in value]
        elif kind is ir.AttributeType.TENSOR:
            described = _tensor(value)
        elif kind is ir.AttributeType.TENSORS:
            described = [_tensor(v) for v in value]
        elif kind is ir.AttributeType.GRAPH:
            described = self.graph(value, bound=False)
        elif kind is ir.AttributeType.GRAPHS:
            described = [self.graph(v, bound=False) for v in value]
        elif kind in (ir.AttributeType.TYPE_PROTO, ir.AttributeType.TYPE_PROTOS):
            described = repr(value)
        else:
            raise InputError(
                f"the attribute {attribute.name!r} is a {kind.name}, which no engine's key can cover: replace it"
            )
        return [attribute.name, kind.name, described]


def _interface(value: ir.Value) -> list[Any]:
    """What a value is bound by: its name, type and shape."""
    shape = None if value.shape is None else [d if isinstance(d, int) else [d.value] for d in value.shape]
    return [value.name, str(value.type), shape]


def _floats(values: Iterable[float]) -> list[str]:
    """ONNX keeps attributes in 32 bits: 0.1 before saving is what 0.1 is after loading."""
    with np.errstate(over="ignore"):
        return [np.float32(v).tobytes().hex() for v in values]


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


class _Hasher:
    """A file to write into that keeps only the hash."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        # Tensors hand over their buffer in its own shape, which a hash does not take.
        flat = memoryview(data).cast("B")
        self.digest.update(flat)
        return flat.nbytes


def _tensor(tensor: ir.TensorProtocol | None) -> list[Any] | None:
    if tensor is None:
        return None
    hasher = _Hasher()
    if tensor.dtype is ir.DataType.STRING:
        for text in tensor.numpy().reshape(-1):
            raw = text.encode() if isinstance(text, str) else bytes(text)
            hasher.write(
                len(raw).to_bytes(8, "little") + raw
            )  # with its length, or ["ab"] would be ["a", "b"]
    elif hasattr(
        tensor, "tofile"
    ):  # all but foreign tensors have it: files in pieces, and always little-endian
        tensor.tofile(hasher)
    else:
        hasher.write(tensor.tobytes())
    return [tensor.dtype.name, list(tensor.shape.numpy()), hasher.digest.hexdigest()]


def _plugin_hash(path: Path) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        raise InputError(
            f"the plugin {path} cannot be read ({error.strerror}): give a file that can"
        ) from error


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _plain(value: Any, where: str) -> Any:
    """The value as JSON gives it back; what JSON would bend or cannot say is refused."""
    if (
        value is None
        or isinstance(value, str | bool | int)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _plain(v, f"{where}.{name}") for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, where) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
    raise InputError(
        f"{where} is {value!r}, and the key of an engine takes text, finite numbers, lists and mappings: convert it"
    )
