"""The process that exports: how it ended is said as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab import apart
from trimtab.errors import ExportError


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed, .* memory runs out"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "was ended by signal 15: .* --debug"),
        ("import sys; sys.exit(3)", "failed with exit code 3: .* --debug"),
    ],
)
def test_only_a_process_that_was_killed_is_said_to_have_run_out_of_memory(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "_CODE", code)
    with pytest.raises(ExportError, match=message) as raised:
        apart.export_apart(tmp_path / "model", {}, tmp_path)
    assert ("memory" in str(raised.value)) == ("KILL" in code)
