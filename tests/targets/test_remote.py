"""Engines that machines share: found there, pushed there, and done without when it does not answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from engines import DEVICE, OPTIONS, FakeBuilder, graph
from fsspec.implementations.memory import MemoryFileSystem

from trimtab.errors import InputError, MissingDependency
from trimtab.targets.cache import CacheEntry, EngineCache


@pytest.fixture
def builder(tmp_path: Path) -> FakeBuilder:
    return FakeBuilder(tmp_path / "counter")


@pytest.fixture(
    params=["memory://bucket/engines", "file://{}/shared", "dir::file://{}/shared", "dir::memory://b"]
)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield request.param.format(tmp_path)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def machine(url: str, tmp_path: Path, name: str) -> EngineCache:
    return EngineCache(url, near=tmp_path / name)


def get(cache: EngineCache, builder: FakeBuilder) -> CacheEntry:
    return cache.get_or_build(graph(), DEVICE, OPTIONS, builder)


def shared(url: str) -> tuple[Any, list[str]]:
    """The file system at the end of a URL, and what it holds."""
    files, root = fsspec.core.url_to_fs(url.removeprefix("dir::"))
    return files, sorted(files.find(root))


def test_what_one_machine_built_another_fetches(url: str, tmp_path: Path, builder: FakeBuilder) -> None:
    one, two = machine(url, tmp_path, "one"), machine(url, tmp_path, "two")
    assert get(one, builder).source == "built"
    fetched = get(two, builder)
    assert fetched.source == "remote" and fetched.path.read_bytes() == builder.payload
    assert fetched.info.seconds == 240.0
    assert get(two, builder).source == "local" and builder.builds() == 1
    assert [Path(name).suffix for name in shared(url)[1]] == [".engine", ".json"]
    assert not list((two.folder / "stage").iterdir())


@pytest.mark.parametrize("part", [".engine", ".json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "nonsense"])
def test_what_is_damaged_there_is_replaced(
    url: str, part: str, damage: str, tmp_path: Path, builder: FakeBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    get(machine(url, tmp_path, "one"), builder)
    files, names = shared(url)
    name = next(name for name in names if name.endswith(part))
    data = bytearray(files.cat_file(name))
    if damage == "missing":
        files.rm_file(name)
    else:
        data[3] ^= 1
        files.pipe_file(
            name, {"flipped": bytes(data), "cut": bytes(data[:9]), "nonsense": b'{"engine": 1}'}[damage]
        )
    again = get(machine(url, tmp_path, "two"), builder)
    assert again.source == "built" and again.path.read_bytes() == builder.payload
    assert ("damaged" in caplog.text) == (damage != "missing" or part == ".engine")
    assert get(machine(url, tmp_path, "three"), builder).source == "remote"


def test_the_last_of_two_that_build_at_once_wins(url: str, tmp_path: Path, builder: FakeBuilder) -> None:
    other = FakeBuilder(builder.counter, payload=b"another" * 50)
    one, two = machine(url, tmp_path, "one"), machine(url, tmp_path, "two")
    late = get(EngineCache(tmp_path / "two"), other)  # built while nothing was shared yet
    get(one, builder)
    assert two._remote is not None
    two._remote.push(late.key.digest, late.path.parent)
    assert get(machine(url, tmp_path, "three"), builder).path.read_bytes() == other.payload
    assert len(shared(url)[1]) == 2  # the replaced engine is gone


def test_a_note_cannot_lead_elsewhere(tmp_path: Path, builder: FakeBuilder) -> None:
    url = f"file://{tmp_path}/shared"
    get(machine(url, tmp_path, "one"), builder)
    note = next((tmp_path / "shared").glob("*.json"))
    data = json.loads(note.read_text())
    data["engine"]["pieces_sha256"] = "/../../counter"
    note.write_text(json.dumps(data))
    assert get(machine(url, tmp_path, "two"), builder).source == "built"
    assert builder.builds() == 2  # the counter was not touched


class Broken(MemoryFileSystem):  # type: ignore[misc]
    """Counts how often it is asked, and never answers."""

    protocol = "broken"
    asked = 0

    def cat_file(self, *args: Any, **kwargs: Any) -> bytes:
        type(self).asked += 1
        raise ConnectionError("no route to host\nand more")


def test_a_place_that_does_not_answer_costs_one_warning(
    tmp_path: Path, builder: FakeBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    fsspec.register_implementation("broken", Broken, clobber=True)
    Broken.asked = 0
    cache = machine("broken://x", tmp_path, "near")
    for version in ("1", "2", "3"):
        builder.version = version
        assert get(cache, builder).source == "built"
    assert get(cache, builder).source == "local"
    assert Broken.asked == 2  # once to read, once to write; then it is left alone for a while
    assert len(caplog.records) == 2 and "no route to host): the local cache goes on alone" in caplog.text


def test_who_may_only_read_still_fetches(
    tmp_path: Path, builder: FakeBuilder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://read-only"
    get(machine(url, tmp_path, "one"), builder)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    reader = machine(url, tmp_path, "two")
    builder.version = "2"
    assert get(reader, builder).source == "built" and "cannot be written" in caplog.text
    builder.version = "1.2.3"
    assert get(reader, builder).source == "remote"
    MemoryFileSystem.store.clear()


def test_a_place_that_cannot_even_be_opened_is_done_without(
    tmp_path: Path, builder: FakeBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert get(machine(f"file://{tmp_path}/file/shared", tmp_path, "near"), builder).source == "built"
    assert "goes on alone" in caplog.text


def test_a_scheme_that_nobody_knows_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Protocol not known: s4"):
        machine("s4://bucket", tmp_path, "near")


def test_without_fsspec_a_url_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    EngineCache(tmp_path / "cache")  # a folder does not need it
    with pytest.raises(MissingDependency, match=r"trimtab\[cache\]"):
        EngineCache("memory://x", near=tmp_path / "cache")
