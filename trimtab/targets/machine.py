"""What the machine at hand says: its files, and the programs that are asked. What it does not say is an empty text."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

MEMINFO = Path("/proc/meminfo")

ANSWER_SECONDS = 10.0
"""A sleeping driver, or a dpkg whose lock another one holds, takes a few to answer; one that hangs must not hang us."""


def read_text(path: Path) -> str:
    """A file's text; nothing where it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def run_text(command: Sequence[str]) -> str:
    """What a program prints; nothing where it fails or is not there."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=True,
        )
        return done.stdout
    return ""


def meminfo_bytes(meminfo: str, field: str) -> int | None:
    """A field of /proc/meminfo in bytes (its "kB" are 1024); None where it is not there."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
