"""Runs `trimtab.targets.worker` and listens to it: what it says, and how it ended."""

from __future__ import annotations

import contextlib
import json
import queue
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trimtab.child import KILLED, how_it_ended, start
from trimtab.targets.base import Progress

_BEAT_S = 1.0
"""The clock that people see has seconds."""


@dataclass(frozen=True)
class Ending:
    """How a build ended.

    Attributes:
        done: What it gave; None where it failed.
        reason: Why it failed, in one line.
        kind: "operator", "memory", "disk" or "build".
        errno: Of a disk's refusal.
    """

    done: Mapping[str, Any] | None = None
    reason: str = ""
    kind: str = "build"
    errno: int | None = None


def run_worker(job: Mapping[str, Any], folder: Path, progress: Progress) -> Ending:
    """Runs one job to its end. Whatever ends this function ends the process too.

    Args:
        job: As `trimtab.targets.worker` takes it.
        folder: Where it runs.
        progress: Told the phases, and the last one again every second.
    """
    with tempfile.TemporaryFile() as log:
        process = start("trimtab.targets.worker", stderr=log, cwd=folder)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            phase = "starting"
            for line in _lines(process.stdout):
                answer = json.loads(line) if line else {}
                if "done" in answer:
                    return Ending(answer["done"])
                if "failed" in answer:
                    return Ending(None, answer["failed"], answer["kind"], answer.get("errno"))
                phase = answer.get("at", phase)
                progress(phase)
            return _crash(process.wait(), log)
        except BrokenPipeError:
            return _crash(process.wait(), log)
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def _lines(stream: IO[str]) -> Iterator[str]:
    """Lines as they come, and an empty one for every second without."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with stream:
            for line in stream:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=_BEAT_S)
        except queue.Empty:
            yield ""
            continue
        if line is None:
            return
        yield line


def _crash(code: int, log: IO[bytes]) -> Ending:
    """What to say of a process that ended without an answer."""
    log.seek(0, 2)
    log.seek(max(0, log.tell() - 4096))
    said = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    last = f" after saying {said[-1]!r:.300}" if said else ""
    killed = code == KILLED
    memory = killed or (code < 0 and "bad_alloc" in "".join(said))
    return Ending(
        reason=f"it {how_it_ended(code)}{'' if killed else last}", kind="memory" if memory else "build"
    )
