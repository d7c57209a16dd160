"""Which files an ONNX graph reads beside itself, found without onnx, which the runtime does not have.

ONNX Runtime before 1.24 follows any path that a graph names, out of the folder as well. Newer ones refuse, but are not
made for Python 3.10. So a graph's bytes are walked here, by protobuf's wire format and the fields of onnx.proto that
lead to a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trimtab.errors import BundleError

_LOCATION = b"location"

# Message -> field -> the message that it holds (onnx.proto).
_FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Protobuf's wire types, without its groups, which onnx.proto has none of."""


def external_locations(path: Path) -> frozenset[str]:
    """What the graph of a file names as places of its tensors, as it is written there.

    Args:
        path: An ONNX file, read whole; its weights are not in it as a rule.

    Raises:
        BundleError: It is no ONNX file.
    """
    try:
        return frozenset(_walk(path.read_bytes(), "model"))
    except (IndexError, ValueError, RecursionError):
        raise BundleError(f"{path} cannot be read as a graph: compile the bundle again") from None


def _walk(data: bytes, message: str) -> Iterator[str]:
    if message == "entry":
        fields = dict.fromkeys((1, 2), b"") | dict(_fields(data))
        if fields[1] == _LOCATION:
            yield fields[2].decode()
        return
    for number, part in _fields(data):
        inner = _FIELDS[message].get(number)
        if inner is not None and _LOCATION in part:  # most nodes hold no tensor, and need not be walked
            yield from _walk(part, inner)


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and contents of every field of bytes, in order."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key >> 32:  # C++'s reader cuts it to 32 bits, and sees another field than this one
            raise ValueError("a key of more than 32 bits")
        wire = key & 7
        if wire == _VARINT:
            _, place = _varint(data, place)
        elif wire in (_FIXED64, _FIXED32):
            place += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            size, start = _varint(data, place)
            place = start + size
            if place > len(data):
                raise ValueError("cut")
            yield key >> 3, data[start:place]
        else:
            raise ValueError("a group")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than 64 bits")
