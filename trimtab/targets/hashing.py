"""Hashes of gigabytes on all cores: hashing lets go of the interpreter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

PIECE = 1 << 26
"""Bytes of a file that one thread hashes. Part of what `pieces_hash` gives: it must not change."""

_THREADS = min(8, os.cpu_count() or 1)
"""More than eight wait for the memory: SHA-256 takes 1.5 GB/s of it for each core."""

_CHUNK = 1 << 20

T = TypeVar("T")
R = TypeVar("R")


def on_all_cores(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What the function gives for each item, in order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def pieces_hash(path: Path) -> str:
    """SHA-256, in hexadecimal, over the SHA-256 of each `PIECE` of a file in turn."""

    def digest(start: int) -> bytes:
        piece, left = hashlib.sha256(), PIECE
        with path.open("rb") as stream:
            stream.seek(start)
            while left and (chunk := stream.read(min(_CHUNK, left))):
                piece.update(chunk)
                left -= len(chunk)
        return piece.digest()

    starts = range(0, max(1, path.stat().st_size), PIECE)
    digests = [digest(0)] if len(starts) == 1 else on_all_cores(digest, starts)
    return hashlib.sha256(b"".join(digests)).hexdigest()
