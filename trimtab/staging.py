"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trimtab.errors import InputError, TrimtabError

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What a system says where there is no more room: on the disk, in one's share of it, or in a file."""


@contextlib.contextmanager
def staged_folder(target: Path, marker: str) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` that takes its name when the block ends well.

    On any error, Ctrl-C included, the folder is removed and whatever stood at ``target`` is untouched. Where ``target``
    is a link, the folder that it leads to is replaced.

    Args:
        target: The final path; a folder there is replaced only if it holds ``marker``.
        marker: A file that says that a folder is of the kind to be written.

    Raises:
        InputError: Something else stands at ``target``, or the place cannot be written.
    """
    check_replaceable(target, marker)
    try:
        target = target.resolve()  # a link stays one, and .. is none of a folder that is moved away
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except RuntimeError as error:  # what Python before 3.13 says of links that go round
        raise InputError(f"{target} leads nowhere: choose another place") from error
    except OSError as error:
        raise InputError(
            f"{target.parent} cannot be written ({error.strerror}): choose another place"
        ) from error
    try:
        yield stage
        stage.chmod(0o777 & ~_umask())
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            target.replace(old)
        try:
            stage.replace(target)
        except BaseException:
            if old is not None:
                old.replace(target)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno in FULL:
            raise TrimtabError(
                f"the disk of {target.parent} is full, and nothing was kept there: make room, or choose another place"
            ) from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


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
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise _refusal(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
