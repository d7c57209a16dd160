"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trimtab.errors import InputError, TrimtabError

logger = logging.getLogger(__name__)

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What a system says where there is no more room: on the disk, in one's share of it, or in a file."""

_TAKEN = frozenset((errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT))
"""What it says where the name that a folder was to take has just been taken, or left."""

_PARTIAL = ".partial"
"""What the names of folders and files end with that are not whole."""

_WAS = "was"
"""What a folder is called inside of the one that it is moved away to."""


@contextlib.contextmanager
def staged_folder(target: Path, marker: str) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` that takes its name when the block ends well.

    On any error, Ctrl-C included, the folder is removed and whatever stood at ``target`` is untouched. Where ``target``
    is a link, the folder that it leads to is replaced. Of two that end at once, the later one stands; whoever has the
    folder `locked` is waited for.

    Args:
        target: The final path; a folder there is replaced only if it holds ``marker``.
        marker: A file that says that a folder is of the kind to be written.

    Raises:
        InputError: Something else stands at ``target``, the place cannot be written, or another run was quicker where
            folders cannot be locked.
    """
    check_replaceable(target, marker)
    try:
        target = target.resolve()  # a link stays one, and .. is none of a folder that is moved away
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent):  # so that nobody finds the new one before it is locked
            _remove_abandoned(target)
            stage = _beside(target)
            stage.mkdir()
            filling = contextlib.ExitStack()
            filling.enter_context(locked(stage))
    except RuntimeError as error:  # what Python before 3.13 says of links that go round
        raise InputError(f"{target} leads nowhere: choose another place") from error
    except OSError as error:
        raise InputError(
            f"{target.parent} cannot be written ({error.strerror}): choose another place"
        ) from error
    try:
        yield stage
        try:
            with locked(target, wait=False):
                pass
        except BlockingIOError:
            logger.warning("another run is at work in %s: waiting until it has ended", target)
        with locked(target), locked(target.parent):
            _put(stage, target)
    except OSError as error:
        if error.errno in FULL:
            raise TrimtabError(
                f"the disk of {target.parent} is full, and nothing was kept there: make room, or choose another place"
            ) from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        filling.close()


def _remove_abandoned(target: Path) -> None:
    """Removes the folders that were to become ``target`` and that nobody fills any more."""
    for stage in target.parent.glob(f".{glob.escape(target.name)}.*{_PARTIAL}"):
        if not stage.is_dir():
            continue  # `write_file`'s
        try:
            handle = _lock(stage, wait=False)
        except (ImportError, OSError):  # it is being filled, or folders cannot be locked here
            continue
        logger.warning("removing %s, which a run left that was killed", stage)
        shutil.rmtree(stage, ignore_errors=True)
        os.close(handle)


def _put(stage: Path, target: Path) -> None:
    """Gives a folder its name. What stood there goes once it has, and comes back where it cannot."""
    old = None
    try:
        if target.exists():
            # Into a new folder, and not onto it: Windows renames no folder to a name that is taken.
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            target.replace(old / _WAS)
        stage.replace(target)
    except BaseException as error:
        if old is not None:
            with contextlib.suppress(OSError):  # it never left, or another one has the name
                (old / _WAS).replace(target)
        if isinstance(error, OSError) and error.errno in _TAKEN:
            raise InputError(
                f"{target} was written by another run meanwhile, and is kept: write to another name, or run this again"
            ) from error
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Keeps others out of a folder that lock it too. The lock is on the folder itself and ends with this process.

    Systems and disks without such locks keep nobody out, and nobody is in a folder that is not there.

    Args:
        folder: Whose.
        wait: Until it is free.

    Raises:
        BlockingIOError: It is not free, and is not waited for.
    """
    try:
        handle = _lock(folder, wait)
    except BlockingIOError:
        raise
    except (ImportError, OSError) as error:  # Windows has no locks on folders
        logger.debug("%s cannot be locked (%s)", folder, error)
        yield
        return
    try:
        yield
    finally:
        os.close(handle)


def _lock(folder: Path, wait: bool) -> int:
    """A handle on the folder that has its lock.

    Raises:
        BlockingIOError: Another one has, and is not waited for.
        OSError: The folder is not there, or its disk has no such locks.
        ImportError: The system has none.
    """
    import fcntl

    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        except FileNotFoundError:
            pass  # it was taken away meanwhile
        except OSError:
            os.close(handle)
            raise
        os.close(handle)  # another one has its name since


def check_replaceable(target: Path, marker: str) -> None:
    """Raises InputError where ``target`` is something that must not be overwritten."""
    if target.exists() and not (
        target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))
    ):
        raise InputError(f"{target} exists and is not what would be written there: choose another name")


def write_file(path: Path, data: bytes) -> None:
    """Writes a file beside and renames it, so that it is whole or not there.

    Raises:
        InputError: The place cannot be written.
        TrimtabError: The disk is full.
    """
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            stream.write(data)
        temporary.replace(path)
    except OSError as error:
        raise _refusal(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # its name is the file's by now, or it was never made
            temporary.unlink()


def append_file(path: Path, data: bytes) -> None:
    """Writes behind what a file holds. Where that fails, a part of it may stand there.

    Raises:
        InputError: The file cannot be written.
        TrimtabError: The disk is full.
    """
    try:
        with path.open("ab") as stream:
            stream.write(data)
    except OSError as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: OSError) -> TrimtabError:
    """Why a file cannot be written."""
    if error.errno in FULL:
        return TrimtabError(f"the disk of {path.parent} is full: make room, or choose another place")
    return InputError(f"{path} cannot be written ({error.strerror}): choose another place")


def _beside(path: Path) -> Path:
    """A name of its own for what is to become ``path``.

    Not tempfile's, whose files and folders are their owner's alone: to give them a new file's permissions takes the
    umask, which a process cannot read but by setting it, for all of its threads.
    """
    return path.parent / f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}"
