"""The process that exports: how it ended is said as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab import apart
from trimtab.child import Child
from trimtab.errors import ExportError, InputError


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("os.kill(os.getpid(), 9)", "was killed, .* memory runs out: make room"),
        ("os.kill(os.getpid(), 15)", "was ended by SIGTERM: see what it said"),
        ("sys.exit(3)", "ended with exit code 3: see what it said"),
    ],
)
def test_only_a_process_that_was_killed_is_said_to_have_run_out_of_memory(
    end: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends.py").write_text(f"import os, sys\ndef main():\n    {end}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(apart, "Child", lambda _: Child("ends"))
    with pytest.raises(ExportError, match=message) as raised:
        apart.export_apart(tmp_path / "model", {}, tmp_path)
    assert ("memory" in str(raised.value)) == (", 9" in end)


def test_what_the_export_refuses_is_raised_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model"):
        apart.export_apart(tmp_path / "model", {}, tmp_path)
