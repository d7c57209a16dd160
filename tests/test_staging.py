"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trimtab.errors import InputError, TrimtabError
from trimtab.staging import locked, staged_folder, write_file


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged_folder(target, "marker") as stage:
        (stage / "marker").write_text("1")
        assert not target.exists() and stage.parent == target.parent
    assert names(target) == ["marker"] and names(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), SystemExit()])
def test_on_any_error_nothing_new_stays_and_the_old_does(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "out"
    with staged_folder(target, "marker") as stage:
        (stage / "marker").write_text("old")
    with pytest.raises(type(error)), staged_folder(target, "marker") as stage:
        (stage / "marker").write_text("new")
        raise error
    assert (target / "marker").read_text() == "old" and names(tmp_path) == ["out"]


def test_a_new_folder_takes_the_old_one_s_place_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("old", "new"):
        with staged_folder(target, "marker") as stage:
            (stage / "marker").write_text(text)
            (stage / text).touch()
    assert names(target) == ["marker", "new"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_in_one_line(tmp_path: Path, number: int) -> None:
    with pytest.raises(TrimtabError, match="is full"), staged_folder(tmp_path / "out", "marker"):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_what_is_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists"), staged_folder(tmp_path / "file", "marker"):
        pass


def test_a_place_that_is_no_folder_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_file(tmp_path / "file" / "x", b"")
    with (
        pytest.raises(InputError, match="cannot be written"),
        staged_folder(tmp_path / "file" / "x", "marker"),
    ):
        pass


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"old")
    write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and names(tmp_path) == ["x"]


def test_permissions_are_a_new_file_s_and_the_process_s_umask_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.delattr(os, "umask")  # for a moment it would be another one for every thread
        write_file(tmp_path / "x", b"")
        with staged_folder(tmp_path / "out", "marker"):
            pass
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def _written(target: Path) -> str:
    with staged_folder(target, "marker") as stage:
        (stage / "marker").write_text("new")
    return (target / "marker").read_text()


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "marker").write_text("old")
    for name, to in (("link", "real"), ("dangling", "other")):
        (tmp_path / name).symlink_to(to)
        assert _written(tmp_path / name) == (tmp_path / to / "marker").read_text() == "new"
        assert (tmp_path / name).is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link", "other", "dangling"}


def test_a_path_through_the_folder_itself_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "marker").write_text("old")
    assert _written(tmp_path / "a" / ".." / "a") == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_links_that_go_round_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    with pytest.raises(InputError):
        _written(tmp_path / "x")


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "marker").write_text("old")
    with pytest.raises(OSError), staged_folder(tmp_path / "a", "marker") as stage:
        replace = Path.replace

        def fails(self: Path, target: Path) -> Path:
            if self == stage:
                raise OSError("no")
            return replace(self, target)

        (stage / "marker").write_text("new")
        patch = pytest.MonkeyPatch()
        patch.setattr(Path, "replace", fails)
    patch.undo()
    assert (tmp_path / "a" / "marker").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_is_replaced_where_none_can_be_renamed_to_a_name_that_is_taken(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _written(tmp_path / "out") == "new"
    (tmp_path / "out" / "marker").write_text("old")
    replace = Path.replace

    def as_on_windows(self: Path, target: Path) -> Path:
        if target.exists() or (fails and self.suffix == ".partial"):
            raise PermissionError(errno.EACCES, "Access is denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", as_on_windows)
    if fails:
        with pytest.raises(PermissionError):
            _written(tmp_path / "out")
    else:
        assert _written(tmp_path / "out") == "new"
    assert (tmp_path / "out" / "marker").read_text() == ("old" if fails else "new")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["marker"]


def _both_end_at_once(target: Path) -> list[BaseException | None]:
    """What two runs raise that write one folder and end together."""
    both = threading.Barrier(2)

    def run(text: str) -> BaseException | None:
        try:
            with staged_folder(target, "marker") as stage:
                for name in ("marker", "beside"):
                    (stage / name).write_text(text)
                both.wait()
        except (OSError, TrimtabError) as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, ("one", "two")))


@pytest.mark.parametrize("there", [False, True])
def test_of_two_that_end_at_once_one_stands_whole_and_nothing_stays_beside_it(
    there: bool, tmp_path: Path
) -> None:
    for number in range(30):
        target = tmp_path / str(number)
        if there:
            assert _written(target) == "new"
        assert _both_end_at_once(target) == [None, None]
        assert (target / "marker").read_text() == (target / "beside").read_text()
    assert names(tmp_path) == sorted(map(str, range(30)))


def test_where_folders_cannot_be_locked_the_slower_of_two_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def after_another(self: Path, target: Path) -> Path:
        if target.name == "out":
            (target / "theirs").mkdir(parents=True)
        return replace(self, target)

    assert _written(tmp_path / "out") == "new"
    message = "out was written by another run meanwhile, and is kept"
    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=message),
        staged_folder(tmp_path / "out", "marker") as stage,
    ):
        (stage / "marker").write_text("ours")
        patch.setattr(Path, "replace", after_another)
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


def test_a_folder_is_not_replaced_while_somebody_works_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _written(tmp_path / "out") == "new"
    with ThreadPoolExecutor(1) as pool:
        with locked(tmp_path / "out"):
            waiting = pool.submit(_written, tmp_path / "out")
            while "waiting until it has ended" not in caplog.text:
                assert not waiting.done()
                time.sleep(0.01)
            (tmp_path / "out" / "more").touch()
        assert waiting.result() == "new"
    assert names(tmp_path / "out") == ["marker"]


def test_who_does_not_wait_is_told_that_a_folder_is_not_free(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
        pass


def test_who_waited_for_a_folder_that_was_replaced_meanwhile_has_the_new_one(tmp_path: Path) -> None:
    folder, held = tmp_path / "out", threading.Event()
    folder.mkdir()

    def late() -> bool:
        held.set()
        with locked(folder):
            return (folder / "new").exists()

    with ThreadPoolExecutor(1) as pool:
        with locked(folder):
            waiting = pool.submit(late)
            held.wait()
            time.sleep(0.1)
            folder.replace(tmp_path / "old")
            folder.mkdir()
            with locked(folder):  # by who put it there
                time.sleep(0.2)
                (folder / "new").touch()
        assert waiting.result(timeout=10)


def test_what_a_killed_run_left_is_removed_and_what_is_being_filled_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from trimtab.staging import staged_folder\n"
        "with staged_folder(Path(sys.argv[1]), 'marker') as stage:\n"
        "    (stage / 'gigabytes').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "out"])
    [left] = tmp_path.iterdir()
    assert names(left) == ["gigabytes"]
    with staged_folder(tmp_path / "other", "marker"):
        assert left.exists()  # another name's
    with staged_folder(tmp_path / "out", "marker") as one:
        assert not left.exists() and "was killed" in caplog.text
        with staged_folder(tmp_path / "out", "marker") as another:
            assert one.exists()
        assert not another.exists() and one.exists()
    assert names(tmp_path) == ["other", "out"]


def test_nothing_is_removed_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(errno.EBADF, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / ".out.1234.partial").mkdir()
    with staged_folder(tmp_path / "out", "marker"):
        pass
    assert names(tmp_path) == [".out.1234.partial", "out"]
