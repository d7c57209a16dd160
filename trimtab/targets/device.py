"""The devices that trimtab knows: those of devices.toml, and the user's own."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from trimtab.errors import InputError, did_you_mean, nearest
from trimtab.manifest import BACKENDS
from trimtab.toml_file import read_toml

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "fp4")


@dataclass(frozen=True)
class JetPack:
    """The software of one JetPack release, which an engine must match.

    Attributes:
        version: Of JetPack, such as "6.2".
        tensorrt: Major and minor version.
        cuda: Major and minor version.
    """

    version: str
    tensorrt: str
    cuda: str

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if not (isinstance(value, str) and re.fullmatch(r"\d+\.\d+", value)):
                raise InputError(f"{field} = {value!r} of a JetPack is not a version such as '10.3': mend it")


@dataclass(frozen=True)
class Device:
    """One kind of device. Peaks are dense and of the GPU alone; docs/devices.md says where they come from.

    Attributes:
        name: What ``--target`` takes.
        title: What people call it.
        backend: The runtime that engines for it are built with, one of `trimtab.manifest.BACKENDS`.
        sm: CUDA compute capability, such as "8.7"; None without a GPU, as are the numbers below.
        memory_bytes: Installed memory in bytes.
        shared_memory: The CPU lives in the same memory.
        bandwidth_gb_s: Memory bandwidth in 1e9 bytes/s.
        sm_count: Streaming multiprocessors.
        clock_mhz: Boost clock in MHz that the peaks are of.
        power_mode: The mode that clocks, peaks and bandwidth are of; None where there is only one.
        fp32_tflops: CUDA cores, in 1e12 FLOP/s (an FMA is two).
        fp16_tflops: Tensor cores, FP16 with FP32 accumulation, in 1e12 FLOP/s; of BF16 as well.
        fp16_fast_tflops: The same with FP16 accumulation: twice as much on GeForce, no more elsewhere.
        int8_tops: Tensor cores, INT8, in 1e12 operations/s; None without.
        fp8_tflops: Tensor cores, FP8 with FP32 accumulation, in 1e12 FLOP/s; None without.
        precisions: What the arithmetic has, of `PRECISIONS`.
        jetpacks: JetPack releases that run on it; empty where it is no Jetson.
        identities: What the machine calls itself: the name that nvidia-smi prints, or a Jetson's part number
            (``p3767-0003``) and words of its device-tree model.
        source: Documents with their addresses that the numbers are from.
        unverified: Fields that no document confirms.

    Raises:
        InputError: A field that cannot be.
    """

    name: str
    title: str
    backend: str
    sm: str | None = None
    memory_bytes: int | None = None
    shared_memory: bool = False
    bandwidth_gb_s: float | None = None
    sm_count: int | None = None
    clock_mhz: float | None = None
    power_mode: str | None = None
    fp32_tflops: float | None = None
    fp16_tflops: float | None = None
    fp16_fast_tflops: float | None = None
    int8_tops: float | None = None
    fp8_tflops: float | None = None
    precisions: tuple[str, ...] = ("fp32",)
    jetpacks: tuple[JetPack, ...] = ()
    identities: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name)):
            raise InputError(f"{self.name!r} is no device name: use small letters, digits, dots and hyphens")
        for field in _TEXTS:
            value = getattr(self, field)
            if not (isinstance(value, str) and value) and (value is not None or field in _ALWAYS):
                raise self._wrong(field, "a text")
        if self.backend not in BACKENDS:
            raise self._wrong("backend", f"one of {', '.join(BACKENDS)}")
        if self.sm is not None and not re.fullmatch(r"\d+\.\d", self.sm):
            raise self._wrong("sm", 'a compute capability such as "8.7"')
        if not isinstance(self.shared_memory, bool):
            raise self._wrong("shared_memory", "true or false")
        for field in _NUMBERS:
            value = getattr(self, field)
            whole = field in ("memory_bytes", "sm_count")
            kinds = (int,) if whole else (int, float)  # by type(), as True is an int too
            if value is not None and not (type(value) in kinds and 0 < value < math.inf):
                raise self._wrong(field, f"a {'whole ' if whole else ''}number above 0")
        for field in _LISTS:
            if not all(isinstance(item, str) and item for item in getattr(self, field)):
                raise self._wrong(field, "a list of texts")
        if not self.precisions or not set(self.precisions) <= set(PRECISIONS):
            raise self._wrong("precisions", f"a list of some of {', '.join(PRECISIONS)}")
        for precision, field in (("int8", "int8_tops"), ("fp8", "fp8_tflops")):
            if getattr(self, field) is not None and precision not in self.precisions:
                raise self._wrong("precisions", f"{precision} too where {field} is given")
        if unknown := set(self.unverified) - _FIELDS.keys():
            raise self._wrong("unverified", f"names of fields, and not {_known(min(unknown))}")

    def _wrong(self, field: str, needed: str) -> InputError:
        value = getattr(self, field)
        shown = list(value) if isinstance(value, tuple) else value
        return InputError(f"the device {self.name!r} has {field} = {shown!r}, and needs {needed}")


_FIELDS = {field.name: field for field in dataclasses.fields(Device)}
_ALWAYS = ("title", "backend")
_TEXTS = (*_ALWAYS, "sm", "power_mode")
_LISTS = ("precisions", "identities", "source", "unverified")
_PEAKS = tuple(name for name in _FIELDS if name.endswith(("_tflops", "_tops")))
_NUMBERS = ("memory_bytes", "bandwidth_gb_s", "sm_count", "clock_mhz", *_PEAKS)
_OF_A_GPU = ("sm", "memory_bytes", "bandwidth_gb_s", "fp32_tflops", "fp16_tflops", "precisions")
"""What a row with a GPU backend must say: without it nothing can be built or estimated."""


def own_devices_file() -> Path | None:
    """``~/.config/trimtab/devices.toml``, where it exists."""
    with contextlib.suppress(RuntimeError, OSError):  # no home folder, or one that cannot be read
        path = Path.home() / ".config" / "trimtab" / "devices.toml"
        return path if path.is_file() else None
    return None


def known_devices(extra: str | Path | None = None) -> dict[str, Device]:
    """All devices by name: trimtab's own, then those of `own_devices_file`, then those of ``extra``.

    A later file adds devices, and overrides single fields of devices that are there.

    Args:
        extra: A TOML file in the form of devices.toml.

    Raises:
        InputError: A file cannot be read, or says something that cannot be.
    """
    with resources.as_file(resources.files(__package__) / "devices.toml") as path:
        rows = _rows({}, path)
    for file in (own_devices_file(), extra):
        if file is not None:
            rows = _rows(rows, Path(file))
    return {name: Device(name=name, **row) for name, row in rows.items()}


def find_device(name: str, extra: str | Path | None = None) -> Device:
    """A device by its name.

    Args:
        name: What ``--target`` was given.
        extra: As in `known_devices`.

    Raises:
        InputError: No such device; the message has the nearest names.
    """
    devices = known_devices(extra)
    if name not in devices:
        raise InputError(f"there is no device {name!r}: {nearest(name, devices)} (see trimtab devices)")
    return devices[name]


def _rows(known: Mapping[str, dict[str, Any]], path: Path) -> dict[str, dict[str, Any]]:
    """The fields of every device after a file: checked, so that an error names the file."""
    rows = dict(known)
    for name, table in read_toml(path).items():
        try:
            if not isinstance(table, dict):
                raise InputError(f"{name!r} stands outside of a device: begin one with [its-name]")
            rows[name] = rows.get(name, {}) | _fields(name, table)
            if missing := [f for f in _needed(rows[name]) if f not in rows[name]]:
                raise InputError(f"the device {name!r} has no {' and no '.join(missing)}: add it")
            Device(name=name, **rows[name])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return rows


def _needed(row: Mapping[str, Any]) -> tuple[str, ...]:
    return _ALWAYS if row.get("backend", "onnxruntime") == "onnxruntime" else (*_ALWAYS, *_OF_A_GPU)


def _fields(name: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """A TOML table as arguments of Device: lists become tuples, tables become JetPacks."""
    row: dict[str, Any] = {}
    for key, value in table.items():
        if key not in _FIELDS or key == "name":
            raise InputError(f"the device {name!r} has an unknown field {_known(key)}")
        row[key] = value
        if key in (*_LISTS, "jetpacks"):
            if not isinstance(value, list):
                raise InputError(f"the device {name!r} has {key} = {value!r}, and needs a list")
            row[key] = tuple(value)
    if "jetpacks" in row:
        row["jetpacks"] = tuple(_jetpack(name, item) for item in row["jetpacks"])
    return row


def _jetpack(name: str, item: Any) -> JetPack:
    keys = [field.name for field in dataclasses.fields(JetPack)]
    if not isinstance(item, dict) or sorted(item) != sorted(keys):
        raise InputError(f"the device {name!r} has a JetPack {item!r}, and needs {', '.join(keys)} in each")
    return JetPack(**item)


def _known(key: str) -> str:
    fields = [field for field in _FIELDS if field != "name"]
    return f"{key!r}: {did_you_mean(key, fields, 'known are ' + ', '.join(fields))}"
