"""Engines in a place that machines share: a bucket, a server, any file system that fsspec knows.

    DIGEST.json             the note of an entry, as it stands beside the local engine
    DIGEST-SHA256.engine    the engine that it speaks of

The engine goes up first and the note last, each under another name and then moved, so a note never speaks of what is
not there. Two machines may build one engine at once: each uploads its own, the last note wins, and both are right.
Nothing here fails a build: what goes wrong is logged, and the local cache goes on alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trimtab.errors import InputError, MissingDependency, first_line
from trimtab.targets.entry import ENGINE, NOTE

logger = logging.getLogger(__name__)

_PAUSE_S = 300
"""A place that did not answer is left alone for this long, so that an outage costs one timeout and not one a build."""

_MAX_NOTE = 1 << 20
"""Bytes; notes have a few hundred."""

T = TypeVar("T")


def is_remote(place: str) -> bool:
    """Whether this is a URL of fsspec's and not a folder."""
    return "://" in place or "::" in place


class Remote:
    """The engines behind a URL.

    Args:
        url: As fsspec takes it: "s3://bucket/engines", "dir::file:///mnt/engines", ...

    Raises:
        MissingDependency: fsspec is not installed.
        InputError: The scheme is unknown, or needs a package that is not installed. Nothing is connected to yet.
    """

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise MissingDependency("fsspec", "cache") from None
        self.url = url
        self._opened: Any = None
        self._paused: dict[str, float] = {}
        for part in url.split("::"):
            try:
                fsspec.get_filesystem_class(part.split("://")[0])
            except (ImportError, ValueError) as error:
                raise InputError(
                    f"{url} cannot be opened ({error}): install that, or give another place"
                ) from None

    def fetch(self, digest: str, folder: Path) -> bool:
        """Copies a note, and the engine that it speaks of, into ``folder``.

        Returns:
            Whether there is a note. It may be damaged, and its engine damaged or missing.
        """

        def read() -> bool:
            note = self._note(digest)
            if note is None:
                return False
            (folder / NOTE).write_bytes(note)
            with contextlib.suppress(FileNotFoundError):
                self._files.get_file(_engine_name(digest, note), str(folder / ENGINE))
            return True

        return bool(self._try("read", read))

    def push(self, digest: str, folder: Path) -> None:
        """Uploads a note and its engine, over what is there."""

        def write() -> None:
            older, note = self._note(digest), (folder / NOTE).read_bytes()
            name = _engine_name(digest, note)
            with contextlib.suppress(Exception):  # buckets have no folders, and may refuse to be asked
                self._files.makedirs("", exist_ok=True)
            self._put(folder / ENGINE, name)
            self._put(folder / NOTE, f"{digest}.json")
            if older is not None and (old_name := _engine_name(digest, older)) != name:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(old_name)

        self._try("written", write)

    def discard(self, digest: str, note: bytes) -> None:
        """Removes an entry that turned out to be damaged, unless another one took its place meanwhile.

        Args:
            digest: Of the key.
            note: As it was fetched.
        """

        def remove() -> None:
            if self._note(digest) == note:
                self._files.rm_file(f"{digest}.json")
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(_engine_name(digest, note))

        self._try("written", remove)

    @property
    def _files(self) -> Any:
        """The file system, rooted at the URL. Opened on first use, since some connect at once."""
        if self._opened is None:
            from fsspec.core import url_to_fs
            from fsspec.implementations.dirfs import DirFileSystem

            files, root = url_to_fs(self.url)
            # "dir::" gives a rooted one already, and the root a second time.
            self._opened = files if isinstance(files, DirFileSystem) else DirFileSystem(root, files)
        return self._opened

    def _note(self, digest: str) -> bytes | None:
        try:
            return bytes(self._files.cat_file(f"{digest}.json", start=0, end=_MAX_NOTE))
        except FileNotFoundError:
            return None

    def _put(self, source: Path, name: str) -> None:
        partial = f".{name}.{uuid.uuid4().hex}.partial"
        try:
            self._files.put_file(str(source), partial)
            self._files.mv(partial, name)
        except BaseException:
            with contextlib.suppress(Exception):
                self._files.rm_file(partial)
            raise

    def _try(self, what: str, action: Callable[[], T]) -> T | None:
        """Runs an action; None where it fails. Reading and writing fail apart: many may only read."""
        if time.monotonic() < self._paused.get(what, 0.0):
            return None
        try:
            return action()
        except Exception as error:  # every file system has its own tree of errors
            self._paused[what] = time.monotonic() + _PAUSE_S
            logger.warning(
                "%s cannot be %s (%s: %s): the local cache goes on alone; check the place and the network",
                self.url,
                what,
                type(error).__name__,
                first_line(error),
            )
            return None


def _engine_name(digest: str, note: bytes) -> str:
    """The name of the engine that a note speaks of; one that no engine has where the note is damaged."""
    try:
        sha256 = json.loads(note)["engine"]["pieces_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        sha256 = ""
    # Notes are not believed: anything but a hash could be a path.
    return f"{digest}-{sha256 if re.fullmatch('[0-9a-f]{64}', str(sha256)) else 'damaged'}.engine"
