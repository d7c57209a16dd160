"""A file that measurements are added to as they are made: what was cut off goes on from it.

Its first line says what was measured; each of the others is one measurement. All are JSON.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trimtab.errors import CalibrationError, InputError
from trimtab.staging import append_file, write_file

logger = logging.getLogger(__name__)

T = TypeVar("T")


def resume(
    path: Path, header: Mapping[str, object], parse: Callable[[Any], T], *, holds: str, measured_on: str
) -> list[T]:
    """What a file holds; one that is not there is begun. A last line that was cut short is dropped.

    Args:
        path: The file.
        header: What is measured: JSON, with the ``fingerprint`` of the model.
        parse: A line's JSON -> a measurement.
        holds: What they are, for messages: "losses".
        measured_on: What else than the model they depend on: "samples".

    Raises:
        CalibrationError: It is no such file, or one of another model or of other samples.
        InputError: It cannot be read or written.
    """
    if _is_new(path):
        write_file(path, _line(header).encode())
        return []
    first, known, cut = _read(path, parse, holds)
    if first != header:
        what = (
            f"on other {measured_on}" if first["fingerprint"] == header["fingerprint"] else "of another model"
        )
        raise CalibrationError(f"{path} holds {holds} {what}: name another file, or remove it")
    if cut is not None:
        logger.warning("the last line of %s was cut short: it is measured again", path)
        write_file(path, f"{cut}\n".encode())  # beside: hours of measurements stand in the old one
    return known


def peek(path: Path, fingerprint: str, parse: Callable[[Any], T], *, holds: str) -> list[T]:
    """What a file holds, whatever it was measured on; nothing where there is none. The file stays as it is.

    Raises:
        CalibrationError: It is no such file, or one of another model.
        InputError: It cannot be read.
    """
    if _is_new(path):
        return []
    first, known, _ = _read(path, parse, holds)
    if first["fingerprint"] != fingerprint:
        raise CalibrationError(f"{path} holds {holds} of another model: name another file, or remove it")
    return known


def header(path: Path, parse: Callable[[Any], T], *, holds: str) -> dict[str, object]:
    """What a file says of its measurements; nothing where there is none. The file stays as it is.

    Raises:
        CalibrationError: It is no such file.
        InputError: It cannot be read.
    """
    if _is_new(path):
        return {}
    return _read(path, parse, holds)[0]


def _is_new(path: Path) -> bool:
    return not path.exists() or (path.is_file() and path.stat().st_size == 0)


def _read(path: Path, parse: Callable[[Any], T], holds: str) -> tuple[dict[str, object], list[T], str | None]:
    """The header, the measurements, and the whole lines of a file whose last one was cut short."""
    try:
        whole, _, cut = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        first, *entries = [json.loads(line) for line in whole.splitlines()]
        first = {"fingerprint": None, **first}
        known = [parse(entry) for entry in entries]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name another file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f"{path} holds no {holds} ({error}): name another file, or remove it"
        ) from error
    return first, known, whole if cut else None


def add(path: Path, measurement: Mapping[str, object]) -> None:
    """Adds one measurement to a file that `resume` has read or begun.

    Raises:
        InputError: It cannot be written.
        TrimtabError: The disk is full.
    """
    append_file(path, _line(measurement).encode())


def _line(data: Mapping[str, object]) -> str:
    return json.dumps(data, allow_nan=False) + "\n"
