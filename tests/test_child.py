"""Processes of their own: they answer, fail in one line, and leave the caller's script alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimtab import errors
from trimtab.child import KILLED, Child, NoAnswer, how_it_ended

ANSWERS = """
import os
from trimtab import errors
from trimtab.child import serve

def answer(question):
    print("what a library says")
    exec(question)
    return question

def main():
    serve(answer)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that executes what it is asked."""
    (tmp_path / "executes.py").write_text(ANSWERS)
    monkeypatch.syspath_prepend(tmp_path)
    return "executes"


def test_a_child_answers_one_question_after_another_whatever_libraries_print(module: str) -> None:
    with Child(module) as child:
        assert [child.ask(text) for text in ("1", "'ä'")] == ["1", "'ä'"]


def test_an_error_of_trimtabs_is_raised_as_what_it_is_and_the_child_goes_on(module: str) -> None:
    with Child(module) as child:
        with pytest.raises(errors.InputError, match="give another"):
            child.ask("raise errors.InputError('give another')")
        with pytest.raises(errors.TrimtabError, match="'x' is not installed"):
            child.ask("raise errors.MissingDependency('x', 'y')")
        assert child.ask("1") == "1"


def test_another_error_is_told_by_its_first_line_and_its_place_is_for_debug(module: str) -> None:
    with Child(module) as child, pytest.raises(NoAnswer) as raised:
        child.ask("raise ValueError('no kernel\\nand so on')")
    message = raised.value.line("the child", "make room")
    assert (
        message.startswith("the child failed (ValueError: no kernel): run it with --debug")
        and "\n" not in message
    )
    assert "and so on" in str(raised.value.__cause__) and "executes.py" in str(raised.value.__cause__)


@pytest.mark.parametrize(
    ("question", "message", "memory"),
    [
        ("raise MemoryError", "ran out of memory", True),
        ("os.kill(os.getpid(), 9)", "was killed, as the system does when memory runs out", True),
        ("os.kill(os.getpid(), 15)", "was ended by SIGTERM", False),
        ("os._exit(3)", "ended with exit code 3", False),
    ],
)
def test_how_a_child_ended_is_said_as_it_was(module: str, question: str, message: str, memory: bool) -> None:
    with Child(module) as child:
        with pytest.raises(NoAnswer) as raised:
            child.ask(question)
        assert str(raised.value) == message and raised.value.memory is memory
        assert ("make room" in raised.value.line("it", "make room")) is memory
        if memory and "kill" in question:
            with pytest.raises(NoAnswer, match="was killed"):  # and so it is when it is asked again
                child.ask("1")


def test_a_module_that_cannot_be_imported_is_an_ended_child() -> None:
    with Child("no.such.module") as child, pytest.raises(NoAnswer, match="ended with exit code 1"):
        child.ask("1")


def test_ctrl_c_is_for_who_started_the_child(module: str) -> None:
    with Child(module) as child:
        child.ask("1")
        child._process.send_signal(signal.SIGINT)
        assert child.ask("2") == "2"


def test_a_script_without_a_guard_is_not_run_again(module: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from trimtab.child import Child\nwith Child('executes') as child:\n    print(child.ask('1'))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout == "1\n"


def test_a_child_at_work_ends_soon_after_who_started_it_was_killed(module: str, tmp_path: Path) -> None:
    started = tmp_path / "started"
    question = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    script = tmp_path / "script.py"
    script.write_text(
        f"from trimtab.child import Child\nwith Child('executes') as child:\n    child.ask({question!r})\n"
    )
    with subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE) as parent:
        while not started.exists():
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
        parent.communicate(timeout=30)  # the end of a stderr that both had


def test_endings_have_names_where_the_system_has_no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGKILL")  # as on Windows
    assert how_it_ended(KILLED).startswith("was killed")
    assert how_it_ended(0xC0000005) == "ended with exit code 3221225477"
    assert how_it_ended(-99) == "was ended by signal 99"
