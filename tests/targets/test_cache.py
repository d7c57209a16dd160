"""The engine cache: built once, found again, whole or not at all, and never larger than it may be."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import DEVICE, OPTIONS, FakeBuilder, churn, graph, want

from trimtab.errors import BuildFailed, InputError, TrimtabError
from trimtab.targets.base import BuildOptions
from trimtab.targets.cache import CacheEntry, EngineCache, clock, engine_key
from trimtab.targets.engines import open_cache
from trimtab.targets.entry import NOTE, _hash

spawn = multiprocessing.get_context("spawn")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


@pytest.fixture
def builder(tmp_path: Path) -> FakeBuilder:
    return FakeBuilder(tmp_path / "counter")


def get(cache: EngineCache, builder: FakeBuilder, version: str = "1.2.3") -> CacheEntry:
    builder.version = version
    return cache.get_or_build(graph(), DEVICE, OPTIONS, builder)


def left(cache: EngineCache) -> list[str]:
    """Everything in the cache but the lock files, which stay."""
    files = (path.relative_to(cache.folder).as_posix() for path in cache.folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not path.startswith("locks/"))


def test_the_second_time_it_is_found(cache: EngineCache, builder: FakeBuilder) -> None:
    built, found = get(cache, builder), get(cache, builder)
    assert (built.source, found.source, builder.builds()) == ("built", "local", 1)
    assert found.path.read_bytes() == builder.payload
    assert (found.info, found.key) == (built.info, built.key)
    assert get(EngineCache(cache.folder), builder).source == "local"
    assert get(cache, builder, "1.2.4").source == "built"
    stats = cache.stats()
    assert (stats.engines, stats.local, stats.built, stats.remote) == (2, 1, 2, 0)
    assert stats.bytes == sum(p.stat().st_size for p in (cache.folder / "entries").rglob("*") if p.is_file())


def test_the_lowered_graph_is_what_counts(cache: EngineCache, builder: FakeBuilder) -> None:
    get(cache, builder)

    class Lowering(FakeBuilder):
        def lower(self, model: Any, device: Any) -> Any:
            model = model.clone()
            model.graph[3].op_type = "Abs"
            return model

    assert get(cache, Lowering(builder.counter)).source == "built"


def test_two_processes_build_once(cache: EngineCache, builder: FakeBuilder) -> None:
    builder.seconds = 0.5
    processes = [spawn.Process(target=want, args=(cache.folder, builder)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0] and builder.builds() == 1


@pytest.mark.parametrize(
    ("fails", "error"), [("error", ValueError), ("interrupt", KeyboardInterrupt), ("nothing", BuildFailed)]
)
def test_a_build_that_fails_leaves_nothing(
    cache: EngineCache, builder: FakeBuilder, fails: str, error: type[BaseException]
) -> None:
    builder.fails = fails
    with pytest.raises(error):
        get(cache, builder)
    assert left(cache) == [] and list((cache.folder / "stage").iterdir()) == []
    builder.fails = ""
    assert get(cache, builder).path.read_bytes() == builder.payload


def test_after_a_builder_is_killed_the_next_one_builds(cache: EngineCache, builder: FakeBuilder) -> None:
    builder.fails = "killed"
    process = spawn.Process(target=want, args=(cache.folder, builder))
    process.start()
    process.join()
    assert process.exitcode == -9 and len(left(cache)) == 1  # half an engine, in the stage
    builder.fails = ""
    get(cache, builder, "another").close()  # any eviction sweeps it
    assert not any(path.startswith("stage/") for path in left(cache))
    assert get(cache, builder).path.read_bytes() == builder.payload


def flip(engine: Path) -> None:
    data = bytearray(engine.read_bytes())
    data[7] ^= 1
    engine.write_bytes(data)


def cut(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-1])


def note_missing(engine: Path) -> None:
    (engine.parent / "entry.json").unlink()


def note_cut(engine: Path) -> None:
    note = engine.parent / "entry.json"
    note.write_text(note.read_text()[:40])


def note_of_another(engine: Path) -> None:
    note = engine.parent / "entry.json"
    data = json.loads(note.read_text())
    data["key"]["backend_version"] = "0"
    note.write_text(json.dumps(data))


def note_without_key(engine: Path) -> None:
    note = engine.parent / "entry.json"
    data = json.loads(note.read_text())
    del data["key"]
    note.write_text(json.dumps(data))


def note_strange(engine: Path) -> None:
    (engine.parent / "entry.json").write_text("[1, null]")


@pytest.mark.parametrize(
    "damage",
    [flip, cut, Path.unlink, note_missing, note_cut, note_of_another, note_without_key, note_strange],
)
def test_a_damaged_entry_is_removed_and_built_again(
    cache: EngineCache,
    builder: FakeBuilder,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    damage(get(cache, builder).path)
    again = get(cache, builder)
    assert again.source == "built" and again.path.read_bytes() == builder.payload
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "damaged" in caplog.text
    assert get(cache, builder).source == "local"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bytes", "3"),
        ("bytes", None),
        ("seconds", "1"),
        ("peak_bytes", -1),
        ("backend", 7),
        ("backend_version", "10\x1b[2J"),
        ("activation_bytes", 1.5),
        ("activation_bytes", 2**63),
    ],
)
def test_an_entry_whose_note_holds_what_no_bundle_can_is_built_again(
    cache: EngineCache, builder: FakeBuilder, field: str, value: object
) -> None:
    note = get(cache, builder).path.parent / NOTE
    data = json.loads(note.read_text())
    del data["sha256"]
    data["info"][field] = value
    note.write_text(json.dumps(data | {"sha256": _hash(data)}))
    assert get(cache, builder).source == "built"


def versions(cache: EngineCache) -> set[str]:
    notes = (cache.folder / "entries").glob("*/entry.json")
    return {json.loads(note.read_text())["key"]["backend_version"] for note in notes}


def size_of_one(cache: EngineCache, builder: FakeBuilder) -> int:
    get(cache, builder, "0").close()
    size = cache.stats().bytes
    cache.clear()
    return size


def test_what_was_not_used_for_longest_is_evicted(cache: EngineCache, builder: FakeBuilder) -> None:
    cache.limit_bytes = 3 * size_of_one(cache, builder)
    for version in ("1", "2", "3", "1", "4"):  # 1 is used again, so 2 is the oldest
        get(cache, builder, version).close()
    assert versions(cache) == {"1", "3", "4"} and cache.stats().bytes <= cache.limit_bytes
    assert get(cache, builder, "2").source == "built"
    assert versions(cache) == {"1", "4", "2"}


def test_what_somebody_has_is_not_evicted(
    cache: EngineCache, builder: FakeBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    cache.limit_bytes = size_of_one(cache, builder)
    first = get(cache, builder, "1")
    with get(EngineCache(cache.folder), builder, "2"):  # its limit is the default
        get(cache, builder, "3").close()
        assert versions(cache) == {"1", "2", "3"} and "give a larger limit" in caplog.text
    get(cache, builder, "4").close()
    assert versions(cache) == {"1", "4"}
    del first  # as good as closed
    gc.collect()
    get(cache, builder, "5").close()
    assert versions(cache) == {"5"} and not list((cache.folder / "leases").iterdir())


def test_a_stray_file_among_the_entries_is_passed_over(cache: EngineCache, builder: FakeBuilder) -> None:
    stray = cache.folder / "entries" / ".DS_Store"
    stray.write_bytes(b"what a file manager leaves")
    assert get(cache, builder).source == "built"
    assert cache.stats().engines == 1
    assert cache.clear() > 0 and stray.exists()


def test_an_engine_over_the_limit_is_still_given(cache: EngineCache, builder: FakeBuilder) -> None:
    cache.limit_bytes = 0
    with get(cache, builder) as entry:
        assert entry.path.read_bytes() == builder.payload


def test_processes_that_evict_and_read_at_once_never_see_half_an_engine(
    cache: EngineCache, builder: FakeBuilder
) -> None:
    limit = 2 * size_of_one(cache, builder)
    processes = [
        spawn.Process(target=churn, args=(cache.folder, builder.counter, limit, 15)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert not [path for path in left(cache) if path.startswith(("stage/", "leases/"))]


def test_clear_leaves_what_is_in_use(cache: EngineCache, builder: FakeBuilder) -> None:
    get(cache, builder, "1").close()
    with get(cache, builder, "2"):
        assert cache.clear() > 0 and versions(cache) == {"2"}
    cache.clear()
    assert left(cache) == [] and cache.stats().bytes == 0


def test_the_last_time_is_remembered(cache: EngineCache, builder: FakeBuilder) -> None:
    key = engine_key(graph(), DEVICE, OPTIONS, builder)
    assert cache.expected_seconds(key) is None
    entry = get(cache, builder)
    entry.close()
    assert cache.expected_seconds(key) == 240.0
    newer = engine_key(graph(), DEVICE, BuildOptions(), FakeBuilder(builder.counter, version="2"))
    assert cache.expected_seconds(newer) == 240.0  # of the same graph, for another version
    cache.limit_bytes = 0
    get(cache, builder, "3").close()
    assert versions(cache) == {"3"} and cache.expected_seconds(key) == 240.0  # though it was evicted
    other = graph()
    other.graph[3].op_type = "Abs"
    assert cache.expected_seconds(engine_key(other, DEVICE, OPTIONS, builder)) is None


def test_a_build_says_what_to_expect(cache: EngineCache, builder: FakeBuilder) -> None:
    said: list[str] = []
    for version in ("1", "2"):
        builder.version = version
        cache.get_or_build(graph(), DEVICE, OPTIONS, builder, progress=said.append)
    assert said == [
        "building an engine for cpu",
        "building an engine for cpu, which took 4:00 the last time",
    ]


@pytest.mark.parametrize(
    ("elapsed", "expected", "text"),
    [(190.7, 240, "3:10 of about 4:00"), (3, None, "0:03"), (270, 240, "4:30 and the last time 4:00")],
)
def test_the_clock(elapsed: float, expected: float | None, text: str) -> None:
    assert clock(elapsed, expected) == text


def test_the_timing_cache_is_private_until_the_block_ends(cache: EngineCache) -> None:
    with cache.timing_cache(87, "10.3.0+cuda12.6") as one:
        assert not one.exists()
        one.write_bytes(b"one")
        with cache.timing_cache(87, "10.3.0+cuda12.6") as two:
            assert not two.exists()
    with cache.timing_cache(87, "10.3.0+cuda12.6") as again, cache.timing_cache(89, "10.3.0") as other:
        assert again.read_bytes() == b"one" and not other.exists()
    assert not one.exists()


def test_timings_of_a_build_that_failed_are_not_kept(cache: EngineCache) -> None:
    with pytest.raises(ValueError), cache.timing_cache(87, "10.3") as path:
        path.write_bytes(b"half")
        raise ValueError
    assert left(cache) == []
    with pytest.raises(InputError, match="is no version"), cache.timing_cache(87, "../x"):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^.*cannot be written.*another folder$"):
        EngineCache(tmp_path / "file" / "cache")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"^.*\(Read-only file system\): give the cache another folder$"):
        EngineCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [(errno.ENOSPC, TrimtabError, "is full"), (errno.EROFS, InputError, "written")],
)
def test_errors_of_the_disk_are_one_line(
    cache: EngineCache, builder: FakeBuilder, number: int, error: type[Exception], text: str
) -> None:
    class Failing(FakeBuilder):
        def build(self, *args: Any) -> Any:
            raise OSError(number, os.strerror(number))

    with pytest.raises(error, match=rf"^[^\n]*{text}[^\n]*$"):
        get(cache, Failing(builder.counter))
    assert left(cache) == []


def test_a_cache_that_was_taken_away_begins_anew(cache: EngineCache, builder: FakeBuilder) -> None:
    get(cache, builder).close()
    shutil.rmtree(cache.folder)
    assert (cache.stats().engines, cache.clear()) == (0, 0)
    assert get(cache, builder).source == "built" and get(cache, builder).source == "local"

    class Losing(FakeBuilder):
        def build(self, *args: Any) -> Any:
            shutil.rmtree(cache.folder)
            return super().build(*args)

    with pytest.raises(
        InputError, match=r"^[^\n]*cannot be written \(No such file or directory\)[^\n]*$"
    ) as error:
        get(cache, Losing(builder.counter), "2")
    assert isinstance(error.value.__cause__, OSError)  # a compile goes on without


def test_what_stands_in_the_place_of_an_entry_is_removed(cache: EngineCache, builder: FakeBuilder) -> None:
    entry = get(cache, builder)
    entry.close()
    for put in (Path.touch, lambda path: path.symlink_to("nowhere")):
        shutil.rmtree(entry.path.parent)
        put(entry.path.parent)
        assert get(cache, builder).source == "built"


def test_a_lower_limit_holds_before_the_next_engine_is_built(
    cache: EngineCache, builder: FakeBuilder
) -> None:
    get(cache, builder).close()
    sizes = []

    class Looking(FakeBuilder):
        def build(self, *args: Any) -> Any:
            sizes.append(cache.stats().bytes)
            return super().build(*args)

    get(EngineCache(cache.folder, limit_bytes=0), Looking(builder.counter), "2").close()
    assert sizes == [0]


def test_without_a_home_the_default_folder_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(InputError, match=r"written \(Could not determine home directory\.\): give the cache"):
        EngineCache("~/.cache/trimtab")
    assert open_cache("~/.cache/trimtab") is None  # a compile goes on without


def test_a_limit_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="below 0"):
        EngineCache(tmp_path, limit_bytes=-1)


def test_a_wait_for_somebody_else_is_said(cache: EngineCache, builder: FakeBuilder) -> None:
    said: list[str] = []

    def build(*args: Any) -> Any:
        second.start()
        while not said:
            time.sleep(0.001)
        return FakeBuilder.build(builder, *args)

    def get_too() -> None:
        cache.get_or_build(graph(), DEVICE, OPTIONS, FakeBuilder(builder.counter), progress=said.append)

    second = threading.Thread(target=get_too)
    first = FakeBuilder(builder.counter)
    first.build = build  # type: ignore[method-assign]
    get(cache, first)
    second.join()
    assert said == ["the same engine is at work in another process: waiting for it"] and builder.builds() == 1
