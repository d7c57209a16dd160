"""Reading TOML tables that people write: every value by its kind; a key nobody asked for is an error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import InputError, nearest


def is_number(value: object) -> bool:
    """Whether a TOML value is an integer or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class Table:
    """One TOML table: values are taken by kind, and what nobody asked for is an error.

    Args:
        path: The file.
        where: What errors call the table.
        data: Its values.
    """

    def __init__(self, path: Path, where: str, data: Mapping[str, Any]) -> None:
        self.path = path
        self.where = where
        self.data = data
        self.asked: list[str] = []

    def __contains__(self, key: str) -> bool:
        """Whether the key is there; it counts as asked for."""
        if key not in self.asked:
            self.asked.append(key)
        return key in self.data

    def take(self, key: str) -> Any:
        """The value as it is; None where there is none."""
        return self.data[key] if key in self else None

    def left(self) -> list[str]:
        """Keys that were not asked for."""
        return [key for key in self.data if key not in self.asked]

    def done(self) -> None:
        """Raises InputError for a key that was not asked for."""
        if left := self.left():
            raise InputError(
                f"{self.path}: {self.where} has no key {left[0]!r}: {nearest(left[0], self.asked)}"
            )

    def _wrong(self, key: str, needed: str) -> InputError:
        where = f"{self.where} has " if self.where else ""
        return InputError(f"{self.path}: {where}{key} = {self.data[key]!r:.60}, and {needed} is needed")

    def table(self, key: str, example: str = "") -> Table:
        """A table inside; ``example`` says what to write where it is missing."""
        if key not in self:
            near = difflib.get_close_matches(key, self.data, 1, 0.7)
            hint = f"rename [{near[0]}]" if near else f"add one with {example}"
            raise InputError(f"{self.path}: there is no table [{key}]: {hint}")
        if not isinstance(self.data[key], dict):
            raise self._wrong(key, "a table")
        inner = f"{self.where[1:-1]}.{key}" if self.where else key
        return Table(self.path, f"[{inner}]", self.data[key])

    def text(self, key: str) -> str | None:
        """A text that is not empty; None where there is none."""
        value = self.take(key)
        if value is not None and not (isinstance(value, str) and value):
            raise self._wrong(key, "a text")
        return value

    def number(self, key: str) -> float | None:
        """A finite number; None where there is none."""
        value = self.take(key)
        if value is not None and not (is_number(value) and abs(value) < float("inf")):
            raise self._wrong(key, "a number")
        return None if value is None else float(value)

    def whole(self, key: str, least: int = 1) -> int | None:
        """A whole number from ``least``; None where there is none."""
        value = self.take(key)
        if value is not None and not (type(value) is int and value >= least):
            raise self._wrong(key, f"a whole number from {least}")
        return value

    def numbers(self, key: str, count: int, whole: bool = False) -> tuple[float, ...] | None:
        """A list of so many numbers; None where there is none."""
        value = self.take(key)
        if value is None:
            return None
        fits = isinstance(value, list) and len(value) == count and all(is_number(number) for number in value)
        if not fits or (whole and not all(type(number) is int and number > 0 for number in value)):
            raise self._wrong(key, f"a list of {count} {'whole numbers from 1' if whole else 'numbers'}")
        return tuple(map(float, value))

    def file(self, key: str, folder: bool = False) -> Path:
        """A path, relative to the TOML file, that exists."""
        name = self.text(key)
        if name is None:
            raise InputError(f'{self.path}: {self.where} has no {key} = "...": name the file')
        path = self.path.parent / name
        if not (path.is_file() or (folder and path.is_dir())):
            found = "is a folder" if path.is_dir() else "does not exist"
            raise InputError(f"{path}, which {self.where} of {self.path.name} names, {found}: give a file")
        return path
