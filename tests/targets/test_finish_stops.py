"""trimtab build: what a build leaves behind that is stopped, or that the disk, the cache or the bundle fails."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import NANO, ORIN, Fake, engines_for, whole

from trimtab.bundle import DIGEST, MANIFEST, open_bundle, update_manifest
from trimtab.cli import main
from trimtab.errors import (
    BuildFailed,
    BundleError,
    InputError,
    TrimtabError,
)
from trimtab.targets import insert
from trimtab.targets.finish import build

pytestmark = pytest.mark.xdist_group("dit")


# ---- stopped ----


class Stop(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 7])
def test_a_build_that_stops_at_any_rename_leaves_a_whole_bundle_and_goes_on(
    folder: Path, orin: Callable[[], int], monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """A build renames four times for each engine: the engine twice, bundle.sha256, bundle.json."""
    renames = 0

    def counted(self: Path, target: Path) -> Path:
        nonlocal renames
        if Path(target).is_relative_to(folder):
            renames += 1
            if renames == moment:
                raise Stop
        return rename(self, target)

    rename = Path.replace
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", counted)
        patched.setattr(insert.Inserter, "_sweep", lambda self: None)  # a kill sweeps nothing
        with pytest.raises(Stop):
            build(folder, [NANO], cache=None)
    finished = [engine for engine in engines_for(folder).values() if engine.built]
    report = build(folder, [NANO], cache=None)
    assert report.kept == len(finished) and len(report.made) == len(engines_for(folder)) - len(finished)
    named = {engine.path for engine in engines_for(folder).values()}
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.engine")} == named
    assert not (folder / "engines" / ".building").exists()


def test_a_build_that_is_killed_goes_on_from_the_engine_that_was_finished(folder: Path, fake: Fake) -> None:
    fake("engine", "hang")
    code = f"""
import sys
sys.path.insert(0, {str(folder.parent / "site")!r})
from trimtab.cli import main
from trimtab.targets import preflight
preflight.look = lambda backend: preflight.Machine(*{dataclasses.astuple(ORIN)!r})
main(["build", {str(folder)!r}, "--no-cache", "--target", {NANO!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    pid = folder.parent / "site" / "pid"
    while not pid.exists() or not pid.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    states = [engine.built for engine in engines_for(folder).values()]
    assert states.count(True) == 1
    while Path(f"/proc/{pid.read_text()}").exists():  # the worker ends with who waits for it
        time.sleep(0.05)


def test_an_interrupted_build_says_that_what_is_finished_is_kept(
    folder: Path, orin: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(insert.Inserter, "_built", interrupt)
    assert main(["build", str(folder), "--no-cache"]) == 1
    assert "interrupted: finished engines are kept" in capsys.readouterr().err


def test_a_builder_that_gives_up_leaves_what_was_finished(folder: Path, fake: Fake, at: Any) -> None:
    fake("engine", "none")
    at(ORIN)
    with pytest.raises(BuildFailed, match="could not find any implementation"):
        build(folder, [NANO], cache=None)
    assert sorted(engine.built for engine in engines_for(folder).values()) == [False, True]


def test_two_builds_at_once_are_refused(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another build is at work"):
        build(folder)
    os.close(handle)


# ---- the disk, the cache, and bundles that mean harm ----


def test_a_cache_that_cannot_be_used_is_left_out_and_said_so(
    folder: Path, orin: Callable[[], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["build", str(folder), "--cache", str(tmp_path / "file" / "cache"), "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["made"]) == orin() > 0
    assert "without a cache" in captured.err


def test_what_another_bundle_built_comes_from_the_cache(
    folder: Path, for_jetson: Path, orin: Callable[[], int], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(for_jetson, tmp_path / "other"))
    for bundle in (folder, other):
        assert len(build(bundle, [NANO], cache=tmp_path / "cache").made) == 2
    assert orin() == 2 and engines_for(folder) == engines_for(other)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "is full; what was finished is kept"), (errno.EROFS, "cannot be written")],
)
def test_a_disk_that_does_not_take_it_is_one_line(
    folder: Path,
    orin: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: int,
    words: str,
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(TrimtabError, match=rf"^[^\n]*{words}[^\n]*$"):
        build(folder, [NANO], cache=tmp_path / "cache")
    whole(folder)


@pytest.mark.parametrize("inner", ["", NANO])
def test_engines_that_lie_elsewhere_are_refused(folder: Path, orin: Callable[[], int], inner: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "theirs.engine").touch()
    if inner:
        (folder / "engines").mkdir()
    (folder / "engines" / inner).symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        build(folder, [NANO], cache=None)
    assert [path.name for path in outside.iterdir()] == ["theirs.engine"]


def test_a_graph_whose_weights_are_not_in_the_list_is_not_read(folder: Path, orin: Callable[[], int]) -> None:
    contents = open_bundle(folder).contents
    files = tuple(file for file in contents.files if file.path != "graphs/denoiser.weights")
    update_manifest(folder, dataclasses.replace(contents, files=files))
    with pytest.raises(BundleError, match=r"graphs/denoiser\.weights is not in the list"):
        build(folder, [NANO], cache=None)


def test_bundle_json_is_replaced_with_both_hashes_at_hand(folder: Path) -> None:
    old = (folder / MANIFEST).read_bytes()
    contents = open_bundle(folder).contents
    update_manifest(folder, dataclasses.replace(contents, metadata={"name": "new"}))
    assert open_bundle(folder).contents.metadata == {"name": "new"}
    (folder / MANIFEST).write_bytes(old)  # what a reader has that came a moment too early
    assert open_bundle(folder).contents == contents
    update_manifest(folder, dataclasses.replace(contents, metadata={"name": "newer"}))
    assert len((folder / DIGEST).read_text().split()) == 2
    (folder / MANIFEST).write_bytes(old.replace(b"denoiser", b"denoisex", 1))
    with pytest.raises(BundleError, match="was changed"):
        open_bundle(folder)
