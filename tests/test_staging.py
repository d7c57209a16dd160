"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from trimtab.errors import InputError, TrimtabError
from trimtab.staging import staged_folder, write_file


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged_folder(target, "marker") as stage:
        (stage / "marker").write_text("1")
        assert not target.exists() and stage.parent == target.parent
    assert names(target) == ["marker"] and names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()])
def test_on_any_error_nothing_new_stays_and_the_old_does(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "out"
    with staged_folder(target, "marker") as stage:
        (stage / "marker").write_text("old")
    with pytest.raises(type(error)), staged_folder(target, "marker") as stage:
        (stage / "marker").write_text("new")
        raise error
    assert (target / "marker").read_text() == "old" and names(tmp_path) == ["out"]


def test_a_new_folder_takes_the_old_one_s_place_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("old", "new"):
        with staged_folder(target, "marker") as stage:
            (stage / "marker").write_text(text)
            (stage / text).touch()
    assert names(target) == ["marker", "new"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_in_one_line(tmp_path: Path, number: int) -> None:
    with pytest.raises(TrimtabError, match="is full"), staged_folder(tmp_path / "out", "marker"):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_what_is_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists"), staged_folder(tmp_path / "file", "marker"):
        pass


def test_a_place_that_is_no_folder_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_file(tmp_path / "file" / "x", b"")
    with (
        pytest.raises(InputError, match="cannot be written"),
        staged_folder(tmp_path / "file" / "x", "marker"),
    ):
        pass


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"old")
    write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and names(tmp_path) == ["x"]
