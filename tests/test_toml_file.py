"""TOML files that cannot be read, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import InputError
from trimtab.toml_file import read_toml


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("= 4")
    with pytest.raises(InputError, match="cannot be read as TOML"):
        read_toml(tmp_path / "x.toml")


def test_a_file_that_is_not_there_needs_no_mending(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml does not exist: give a TOML file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\): give a TOML file"):
        read_toml(tmp_path)
