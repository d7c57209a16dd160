"""Processes that share one engine cache, made by fork: run as a script, so that it has one thread and forks safely.

    python cache_driver.py race FOLDER COUNT           COUNT processes want one engine at the same moment
    python cache_driver.py kill FOLDER COUNT SEED      COUNT processes fill the cache, each killed at a random moment

Prints one JSON object. Needs the folder of the tests in PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from engines import DEVICE, OPTIONS, FakeBuilder, graph

from trimtab.targets.cache import EngineCache
from trimtab.targets.entry import ENGINE, NOTE
from trimtab.targets.hashing import pieces_hash

_LIFE_S = 0.06
"""Beyond the first engine: long enough for some of a megabyte, so that a kill meets every part of the work on one."""


def _payload(version: str) -> bytes:
    return version.encode().rjust(8, b"-") * (1 << 17)


def race(folder: Path, count: int) -> dict[str, Any]:
    """Exit codes, and how often the engine was built."""
    builder = FakeBuilder(folder.parent / "counter", seconds=0.3)
    ready, go = os.pipe()
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(ready, 1)  # until the last one is there
            with EngineCache(folder).get_or_build(graph(), DEVICE, OPTIONS, builder) as entry:
                os._exit(entry.path.read_bytes() != builder.payload)
        children.append(child)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"codes": codes, "builds": builder.builds()}


def kill(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """How many entries were finished, lost and damaged, and what the kills met."""
    dice, done = random.Random(seed), folder.parent / "done"
    done.touch()
    met = {"building": 0, "elsewhere": 0}
    for life in range(count):
        noted = done.stat().st_size
        child = os.fork()
        if child == 0:
            _fill(folder, done, life)
        while done.stat().st_size == noted:
            time.sleep(0.001)
        time.sleep(dice.random() * _LIFE_S)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        half = any((folder / "stage").glob("*/*"))
        met["building" if half else "elsewhere"] += 1
    cache, lost = EngineCache(folder), []
    versions = done.read_text().split()
    for version in versions:
        builder = FakeBuilder(folder.parent / "counter", _payload(version), version=version, fails="error")
        try:
            with cache.get_or_build(graph(), DEVICE, OPTIONS, builder) as entry:
                assert entry.path.read_bytes() == builder.payload
        except ValueError:  # it would have been built again
            lost.append(version)
    damaged = [entry.name for entry in (folder / "entries").iterdir() if not _whole(entry)]
    cache.get_or_build(graph(), DEVICE, OPTIONS, FakeBuilder(folder.parent / "counter")).close()
    left = [path.name for path in (folder / "stage").iterdir()]
    return {"finished": len(versions), "lost": lost, "damaged": damaged, "left": left, "met": met}


def _fill(folder: Path, done: Path, life: int) -> None:
    """Builds engines until it is killed, and notes each that it got."""
    cache = EngineCache(folder)
    for turn in range(10_000):
        version = f"{life}.{turn}"
        builder = FakeBuilder(folder.parent / "counter", _payload(version), version=version)
        with cache.get_or_build(graph(), DEVICE, OPTIONS, builder), done.open("a") as stream:
            stream.write(f"{version}\n")
    os._exit(1)


def _whole(entry: Path) -> bool:
    written = json.loads((entry / NOTE).read_text())["engine"]["pieces_sha256"]
    return pieces_hash(entry / ENGINE) == str(written)


if __name__ == "__main__":
    what, place, *numbers = sys.argv[1:]
    print(json.dumps({"race": race, "kill": kill}[what](Path(place), *map(int, numbers))))
