"""The devices that trimtab knows, read from devices.toml."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from importlib import resources

from trimtab.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: What ``--target`` takes.
        title: What people call it.
        backend: The runtime that engines for it are built with.
    """

    name: str
    title: str
    backend: str


def known_devices() -> dict[str, Device]:
    """All devices by name."""
    text = resources.files(__package__).joinpath("devices.toml").read_text(encoding="utf-8")
    return {name: Device(name=name, **row) for name, row in tomllib.loads(text).items()}


def find_device(name: str) -> Device:
    """A device by its name.

    Raises:
        InputError: No such device; the message has the nearest names.
    """
    devices = known_devices()
    if name not in devices:
        near = difflib.get_close_matches(name, devices, 3, 0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(
            f"there is no device {name!r}: {hint}known are {', '.join(devices)} (see trimtab devices)"
        )
    return devices[name]
