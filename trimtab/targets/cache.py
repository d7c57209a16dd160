"""The engine cache: an engine is built once for everything that it was made from, and found again.

    entries/DIGEST/engine       the engine
    entries/DIGEST/entry.json   its key, size, hash and what its build took; its mtime is the last use
    locks/DIGEST.lock           held while an entry is read, fetched, built or removed
    leases/DIGEST.*             held while somebody has the entry: such an entry is not evicted
    stage/DIGEST                an entry that is being made; renamed when it is whole
    times/GRAPH-DIGEST.json     what builds took, kept when their engines are evicted
    timing/smSM-VERSION.cache   TensorRT's kernel timings

All locks are the operating system's: they end with their process, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from trimtab.errors import BuildFailed, InputError, MissingDependency, TrimtabError
from trimtab.staging import FULL, write_file
from trimtab.targets.base import Builder, BuildOptions, EngineInfo, Progress
from trimtab.targets.device import Device
from trimtab.targets.entry import ENGINE, NOTE, CacheEntry, last_use, verified, write_note
from trimtab.targets.key import EngineKey, engine_key, graph_digest
from trimtab.targets.place import DEFAULT_CACHE
from trimtab.targets.remote import Remote, is_remote

try:
    from filelock import FileLock, Timeout
except ImportError:
    raise MissingDependency("filelock", "cache") from None

__all__ = ["CacheEntry", "CacheStats", "EngineCache", "EngineKey", "clock", "engine_key", "graph_digest"]

logger = logging.getLogger(__name__)

_FOLDERS = ("entries", "locks", "leases", "stage", "times", "timing")


@dataclass(frozen=True)
class CacheStats:
    """What the local folder holds, and what this object did.

    Attributes:
        engines: Entries.
        bytes: Their size.
        limit_bytes: What it may grow to.
        local: Engines found in the folder.
        remote: Engines fetched.
        built: Engines built.
    """

    engines: int
    bytes: int
    limit_bytes: int
    local: int
    remote: int
    built: int


class EngineCache:
    """Engines by what they were made from, in a folder or in a place that machines share.

    Args:
        place: A folder, or a URL of fsspec's such as "s3://bucket/engines". In front of a URL stands a local folder.
        limit_bytes: What the local folder may grow to. A shared place has its own rules of keeping.
        near: The local folder in front of a URL.

    Raises:
        InputError: The folder cannot be written, or the URL names something unknown.
        MissingDependency: A URL is given and fsspec is not installed.
    """

    def __init__(
        self, place: str | Path, limit_bytes: int = 50 * 2**30, *, near: str | Path = DEFAULT_CACHE
    ) -> None:
        if limit_bytes < 0:
            raise InputError(f"the limit is {limit_bytes} bytes and must not be below 0: give a larger one")
        self._remote = Remote(str(place)) if is_remote(str(place)) else None
        self.limit_bytes = limit_bytes
        self._counts = {"local": 0, "remote": 0, "built": 0}
        self.folder = Path(near if self._remote else place)
        try:
            self.folder = self.folder.expanduser()
            self._make_folders()
            tempfile.TemporaryFile(dir=self.folder / "stage").close()
        except (OSError, RuntimeError) as error:  # the latter of who has no home folder
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"{self.folder} cannot be written ({reason}): give the cache another folder"
            ) from error

    def get_or_build(
        self,
        model: ir.Model,
        device: Device,
        options: BuildOptions,
        builder: Builder,
        *,
        progress: Progress = logger.info,
    ) -> CacheEntry:
        """The engine of a graph: found, fetched, or built.

        Of several processes that want the same engine one builds it and the others wait; other engines go on.

        Args:
            model: Any graph; the builder lowers it first. Stays as it was.
            device: The target.
            options: See there.
            builder: Makes the engine, if need be.
            progress: Told what takes its time.

        Raises:
            InputError: An option cannot be part of a key, or the folder can no longer be written.
            UnsupportedOp, BuildFailed: The builder's.
            TrimtabError: The disk is full.
        """
        model = builder.lower(model, device)
        key = engine_key(model, device, options, builder)
        with self._one_line(), self._waiting(key, progress):
            self._make_folders()
            entry = self._found(key) or self._fetched(key)
            if entry is None:
                entry = self._built(key, model, device, options, builder, progress)
        if entry.source == "built" and self._remote:
            progress(f"uploading the engine to {self._remote.url}")
            self._remote.push(key.digest, entry.path.parent)
        if entry.source != "local":
            self._evict()
        self._counts[entry.source] += 1
        return entry

    def expected_seconds(self, key: EngineKey) -> float | None:
        """What this build took the last time, or the most alike of the same graph: for another version, device, ...

        Returns:
            Seconds; None where this graph was never built here.
        """
        wanted, times = key.plain(), []
        for path in (self.folder / "times").glob(f"{key.graph[:16]}-*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                data = json.loads(path.read_bytes())
                alike = sum(data["key"].get(name) == value for name, value in wanted.items())
                times.append((alike, path.stat().st_mtime_ns, float(data["seconds"])))
        return max(times)[2] if times else None

    @contextlib.contextmanager
    def timing_cache(self, sm: int, version: str) -> Iterator[Path]:
        """A private copy of TensorRT's kernel timings, put back when the block ends well.

        Builders at work at the same time do not see each other's timings, and the last one's are kept. Each started
        from what was there, so this loses at worst some timings of one build, which are measured again; to join two
        caches takes TensorRT itself.

        Args:
            sm: Compute capability, such as 87.
            version: TensorRT's exact version.

        Yields:
            A file, absent the first time. It may be overwritten.

        Raises:
            InputError: The version is no version, or the folder cannot be written.
        """
        if not re.fullmatch(r"\w[\w.+-]*", version):
            raise InputError(f"{version!r} is no version: give TensorRT's own, such as 10.13.3.9")
        shared = self.folder / "timing" / f"sm{sm}-{version}.cache"
        with tempfile.TemporaryDirectory(prefix="trimtab-timing-") as folder:
            private = Path(folder) / shared.name
            before = shared.read_bytes() if shared.exists() else b""
            if before:
                private.write_bytes(before)
            yield private
            after = private.read_bytes() if private.exists() else b""
            if after and after != before:
                write_file(shared, after)

    def stats(self) -> CacheStats:
        """What the local folder holds, and what this object did since it was made."""
        with self._one_line():
            sizes = self._sizes()
        return CacheStats(len(sizes), sum(sizes.values()), self.limit_bytes, **self._counts)

    def clear(self) -> int:
        """Empties the local folder, less what is in use. A shared place is left alone: it is others' too.

        Returns:
            Bytes of the engines removed.
        """
        with self._one_line():
            freed = sum(size for folder, size in self._sizes().items() if self._removed(folder))
            for path in [*(self.folder / "times").glob("*"), *(self.folder / "timing").glob("*")]:
                if not path.name.startswith("."):  # being written
                    path.unlink(missing_ok=True)
        return freed

    def _make_folders(self) -> None:
        """Somebody may have taken the cache away since it was opened: it begins anew."""
        for name in _FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / f"{name}.lock", thread_local=False)

    @contextlib.contextmanager
    def _waiting(self, key: EngineKey, progress: Progress) -> Iterator[None]:
        """Holds the lock of one key, and says so if it has to be waited for."""
        lock = self._lock(key.digest)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            progress("the same engine is at work in another process: waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _found(self, key: EngineKey) -> CacheEntry | None:
        """The local entry of a key if it is whole; a damaged one is removed. The key's lock must be held."""
        folder = self.folder / "entries" / key.digest
        if not os.path.lexists(folder):
            return None
        info = verified(folder, key)
        if isinstance(info, str):
            logger.warning("the cached engine %s is damaged (%s): it is removed and made again", folder, info)
            shutil.rmtree(folder, ignore_errors=True)
            if os.path.lexists(folder):  # no folder
                folder.unlink()
            return None
        return self._taken(key, info, "local")

    def _taken(self, key: EngineKey, info: EngineInfo, source: str) -> CacheEntry:
        """The entry with a lease on it, used just now. The key's lock must be held, and the entry be whole."""
        self._leased(key.digest)  # sweeps the leases of processes that were killed
        lease = FileLock(self.folder / "leases" / f"{key.digest}.{uuid.uuid4().hex}", thread_local=False)
        lease.acquire()
        folder = self.folder / "entries" / key.digest
        os.utime(folder / NOTE)
        return CacheEntry(folder / ENGINE, key, info, source, lease)

    def _fetched(self, key: EngineKey) -> CacheEntry | None:
        if self._remote is None:
            return None
        with self._staged(key.digest) as stage:
            if not self._remote.fetch(key.digest, stage):
                return None
            info = verified(stage, key)
            if isinstance(info, str):
                logger.warning(
                    "the engine %s in %s is damaged (%s): it is removed and made again",
                    key.digest,
                    self._remote.url,
                    info,
                )
                self._remote.discard(key.digest, (stage / NOTE).read_bytes())
                return None
            stage.replace(self.folder / "entries" / key.digest)
        return self._taken(key, info, "remote")

    def _built(
        self,
        key: EngineKey,
        model: ir.Model,
        device: Device,
        options: BuildOptions,
        builder: Builder,
        progress: Progress,
    ) -> CacheEntry:
        self._evict(warn=False)  # a disk that is full gets room by a lower limit
        seconds = self.expected_seconds(key)
        last = f", which took {_minutes(seconds)} the last time" if seconds is not None else ""
        progress(f"building an engine for {device.name}{last}")
        start = time.monotonic()

        def at(what: str) -> None:
            progress(f"{device.name}: {what}, {clock(time.monotonic() - start, seconds)}")

        with self._staged(key.digest) as stage:
            info = builder.build(model, device, options, stage / ENGINE, at)
            if not (stage / ENGINE).is_file():
                raise BuildFailed(f"{builder.backend} ended without an engine: see its log, and report this")
            write_note(stage, key, info)
            stage.replace(self.folder / "entries" / key.digest)
        times = self.folder / "times" / f"{key.graph[:16]}-{key.digest}.json"
        with contextlib.suppress(TrimtabError):  # the engine is there, and worth more than its time
            write_file(times, json.dumps({"key": key.plain(), "seconds": info.seconds}).encode())
        return self._taken(key, info, "built")

    @contextlib.contextmanager
    def _staged(self, digest: str) -> Iterator[Path]:
        """An empty folder, gone when the block ends. The key's lock must be held, so nobody else is in it."""
        stage = self.folder / "stage" / digest
        if stage.exists():  # of a process that was killed
            shutil.rmtree(stage)
        stage.mkdir()
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _evict(self, warn: bool = True) -> None:
        """Removes what was not used for longest until the limit holds, and what killed processes left behind."""
        with self._lock("evict"):  # two at once would each free the whole excess
            for stage in (self.folder / "stage").iterdir():
                self._removed(stage)
            sizes = self._sizes()
            total = sum(sizes.values())
            for folder in sorted(sizes, key=last_use):
                if total <= self.limit_bytes:
                    return
                if self._removed(folder):
                    logger.info("evicted the engine %s", folder.name)
                    total -= sizes[folder]
        if warn and total > self.limit_bytes:
            logger.warning(
                "%s holds %d bytes that are all in use, and its limit is %d: give a larger limit",
                self.folder,
                total,
                self.limit_bytes,
            )

    def _removed(self, folder: Path) -> bool:
        """Removes a folder of one key, unless somebody is at work on it or has the entry."""
        lock = self._lock(folder.name)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        try:
            if self._leased(folder.name):
                return False
            shutil.rmtree(folder, ignore_errors=True)  # what stays is found damaged, and removed again
            return not folder.exists()
        finally:
            lock.release()

    def _leased(self, digest: str) -> bool:
        """Whether somebody has the entry. The key's lock must be held: no lease is taken meanwhile."""
        leased = False
        for path in (self.folder / "leases").glob(f"{digest}.*"):
            lease = FileLock(path, thread_local=False)
            try:
                lease.acquire(blocking=False)
            except Timeout:
                leased = True
            else:
                lease.release()
                path.unlink(missing_ok=True)
        return leased

    def _sizes(self) -> dict[Path, int]:
        """Bytes of every entry. Entries may go while they are counted, and a stray file is none."""
        sizes = {}
        for folder in (self.folder / "entries").glob("*"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                sizes[folder] = sum(path.stat().st_size for path in folder.iterdir())
        return sizes

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Errors of the disk, said in one line."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise TrimtabError(
                    f"the disk of {self.folder} is full, and nothing was kept there: make room, or lower the limit"
                ) from error
            where = error.filename or self.folder
            lost = isinstance(error, FileNotFoundError) and Path(where).is_relative_to(self.folder)
            if lost or error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise InputError(
                    f"{where} cannot be written ({error.strerror}): give the cache another folder"
                ) from error
            raise


def clock(elapsed: float, expected: float | None) -> str:
    """Elapsed seconds beside those of the last time: "3:10 of about 4:00". No bar: nobody knows how far a build is."""
    if expected is None:
        return _minutes(elapsed)
    return f"{_minutes(elapsed)} {'of about' if elapsed <= expected else 'and the last time'} {_minutes(expected)}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
