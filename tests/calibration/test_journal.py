"""The file that measurements are added to: what it holds when something stops in between."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from trimtab.calibration.journal import add, resume
from trimtab.errors import InputError, TrimtabError

HEADER = {"fingerprint": "f"}


def known(path: Path) -> list[Any]:
    return resume(path, HEADER, lambda entry: entry, holds="losses", measured_on="samples")


def test_what_was_measured_outlives_a_mending_that_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "losses"
    assert known(path) == []
    for loss in (1, 2, 3):
        add(path, {"loss": loss})
    path.write_bytes(path.read_bytes()[:-3])
    cut = path.read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(TrimtabError, match="is full"):
            known(path)
    assert path.read_bytes() == cut and [p.name for p in tmp_path.iterdir()] == ["losses"]
    assert known(path) == [{"loss": 1}, {"loss": 2}] == known(path)


def test_a_measurement_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        add(tmp_path, {"loss": 1})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_disk_that_fills_up_while_measuring_is_one_line() -> None:
    with pytest.raises(TrimtabError, match="is full"):
        add(Path("/dev/full"), {"loss": 1})
