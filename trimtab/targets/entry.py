"""An entry of the cache: an engine, and the note beside it that says what it is and proves that it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trimtab.targets.base import EngineInfo
from trimtab.targets.hashing import pieces_hash
from trimtab.targets.key import EngineKey

if TYPE_CHECKING:
    from filelock import FileLock

ENGINE = "engine"
NOTE = "entry.json"

_SCHEMA = 1
"""Of the note; an engine with another one is built again."""


@dataclass(frozen=True)
class CacheEntry:
    """An engine of the cache. It is not evicted while this object lives, in whichever process; see `close`.

    Attributes:
        path: The engine's file. Not to be changed.
        key: What it was made from.
        info: Its size, and what its build took.
        source: Where it was found: "local" or "remote"; or "built".
    """

    path: Path
    key: EngineKey
    info: EngineInfo
    source: str
    _lease: FileLock = field(repr=False, compare=False)

    def close(self) -> None:
        """Lets the cache evict the engine. A loaded engine does not need its file."""
        self._lease.release()
        Path(self._lease.lock_file).unlink(missing_ok=True)

    def __enter__(self) -> CacheEntry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_note(folder: Path, key: EngineKey, info: EngineInfo) -> None:
    """Writes the note beside the engine of a folder."""
    engine = folder / ENGINE
    note = {
        "schema": _SCHEMA,
        "key": key.plain(),
        "engine": {"bytes": engine.stat().st_size, "pieces_sha256": pieces_hash(engine)},
        "info": asdict(info),
    }
    (folder / NOTE).write_text(json.dumps(note | {"sha256": _hash(note)}, indent=1), encoding="utf-8")


def verified(folder: Path, key: EngineKey) -> EngineInfo | str:
    """What the note says of the engine if both are as they were written; else what is wrong, in a few words."""
    try:
        note: Any = json.loads((folder / NOTE).read_bytes())
        sealed = note.pop("sha256") == _hash(note)
        info = _info(note["info"])
        size, written = note["engine"]["bytes"], note["engine"]["pieces_sha256"]
        ours = note["schema"] == _SCHEMA and note["key"] == key.plain()
    except FileNotFoundError:
        return f"{NOTE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{NOTE} cannot be read"
    if not sealed:
        return f"{NOTE} was changed"
    if not ours:
        return f"{NOTE} is of another engine"
    try:
        actual = (folder / ENGINE).stat().st_size
        if actual != size:
            return f"{actual} bytes, and {size} were written"
        if pieces_hash(folder / ENGINE) != written:
            return "its hash is not that of what was written"
    except FileNotFoundError:
        return "the engine is missing"
    except OSError as error:  # a failing disk
        return f"the engine cannot be read: {error.strerror}"
    return info


def _info(data: Any) -> EngineInfo:
    """What a note says of an engine; raises TypeError, ValueError or AttributeError where a bundle could not."""
    info = EngineInfo(**data)
    counts = [n for n in (info.bytes, info.peak_bytes, info.activation_bytes) if n is not None]
    if info.bytes is None or any(type(n) is not int or not 0 <= n < 2**63 for n in counts):
        raise ValueError("sizes that are none")
    if type(info.seconds) not in (int, float) or not info.seconds >= 0:
        raise ValueError("a time that is none")
    if not (info.backend.isprintable() and info.backend_version.isprintable()):
        raise ValueError("names that are none")
    return info


def _hash(note: Any) -> str:
    """Of what a note says, however it is written."""
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def last_use(folder: Path) -> int:
    """When an entry was last asked for, in nanoseconds since 1970."""
    with contextlib.suppress(OSError):
        return (folder / NOTE).stat().st_mtime_ns
    return 0  # without its note it is of no use to anybody
