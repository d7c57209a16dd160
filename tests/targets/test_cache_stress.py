"""The engine cache under what happens in the field: many processes, kills, and rot."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import DEVICE, OPTIONS, FakeBuilder, graph

from trimtab.targets import hashing
from trimtab.targets.cache import EngineCache
from trimtab.targets.entry import verified

KILLS = 50


def drive(*arguments: object) -> Any:
    here = Path(__file__).parent
    command = [sys.executable, str(here / "cache_driver.py"), *map(str, arguments)]
    found = os.environ | {"PYTHONPATH": os.pathsep.join((str(here.parent), str(here.parents[1])))}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=found).stdout)


def test_of_eight_processes_at_once_one_builds(tmp_path: Path) -> None:
    assert drive("race", tmp_path / "cache", 8) == {"codes": [0] * 8, "builds": 1}


def test_kills_at_fifty_random_moments_lose_and_damage_nothing(tmp_path: Path) -> None:
    told = drive("kill", tmp_path / "cache", KILLS, 0)
    assert told["finished"] >= KILLS and told["met"]["building"] > 0
    assert (told["lost"], told["damaged"], told["left"]) == ([], [], [])


@pytest.mark.slow
def test_kills_at_many_more_moments_do_not_either(tmp_path: Path) -> None:
    told = drive("kill", tmp_path / "cache", 1000, 1)
    assert (told["lost"], told["damaged"], told["left"]) == ([], [], [])


def test_a_flipped_bit_is_found_a_thousand_times_of_a_thousand(tmp_path: Path) -> None:
    entry = EngineCache(tmp_path).get_or_build(graph(), DEVICE, OPTIONS, FakeBuilder(tmp_path / "counter"))
    folder, dice = entry.path.parent, random.Random(0)
    assert verified(folder, entry.key) == entry.info
    found = 0
    for turn in range(1000):
        path = folder / ("entry.json" if turn % 4 == 0 else "engine")
        data = bytearray(path.read_bytes())
        where, bit = dice.randrange(len(data)), 1 << dice.randrange(8)
        data[where] ^= bit
        path.write_bytes(data)
        found += isinstance(verified(folder, entry.key), str)
        data[where] ^= bit
        path.write_bytes(data)
    assert found == 1000 and verified(folder, entry.key) == entry.info


def test_every_byte_of_a_file_of_several_pieces_counts_and_so_does_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "PIECE", 16)
    path = tmp_path / "file"
    data = bytes(range(50))
    seen = set()
    changes = [data, data[:-1], data + b"\0", data[16:32] + data[:16] + data[32:], b""]
    changes += [data[:i] + b"\xff" + data[i + 1 :] for i in range(len(data))]
    for changed in changes:
        path.write_bytes(changed)
        seen.add(hashing.pieces_hash(path))
    assert len(seen) == len(changes)
