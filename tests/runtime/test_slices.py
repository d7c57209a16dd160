"""Slices of tensors in a plan: who makes the whole, and what reading a part of it reads."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.errors import BundleError
from trimtab.program import Call, needed, reads
from trimtab.runtime.executor import _Buffers
from trimtab.runtime.sessions.onnxruntime import OnnxRuntimeCpu


def test_a_slice_is_a_view_of_what_was_written_whole() -> None:
    table = _Buffers(2, OnnxRuntimeCpu())
    rows = table.make("rows", (3, 4), "float32")
    numbers = table.make("numbers", (3,), "float32")
    row, number = table.get("rows[2]"), table.get("numbers[1]")
    rows[2] = 5
    numbers[1] = 7
    assert row.shape == (4,) and (row == 5).all()
    assert number.shape == () and number == 7
    assert np.shares_memory(number, numbers)


def test_the_state_has_the_slots_of_its_bundle() -> None:
    table = _Buffers(2, OnnxRuntimeCpu())
    slot = table.make("state[1]", (1, 4), "float32")
    slot[...] = 3
    assert table.get("state").shape == (2, 1, 4) and (table.get("state")[1] == 3).all()
    with pytest.raises(BundleError, match=r"state\[2\]"):
        table.make("state[2]", (1, 4), "float32")


@pytest.mark.parametrize("name", ["rows[3]", "scalar[0]", "other[0]", "other"])
def test_what_is_not_there_cannot_be_read(name: str) -> None:
    table = _Buffers(2, OnnxRuntimeCpu())
    table.make("rows", (3, 4), "float32")
    table.make("scalar", (), "float32")
    with pytest.raises(BundleError, match="compile again"):
        table.get(name)


def test_reading_a_part_reads_the_whole() -> None:
    assert reads({"state"}, "state[1]")
    assert reads({"rows[3]"}, "rows")
    assert reads({"rows[3]"}, "rows[3]")
    assert not reads({"rows[3]"}, "rows[2]")
    assert not reads({"rows[3]"}, "row")


def test_a_call_that_writes_a_table_is_needed_by_who_reads_a_row() -> None:
    make = Call("shift", {"noise": "state[0]"}, {"rows": "rows"})
    idle = Call("idle", {}, {"rows": "others"})
    step = Call("denoiser", {"weights": "rows[3]"}, {"next": "latents"})
    assert needed([make, idle], [step]) == (make,)
