"""A process of its own: how it is started, asked, and how it is said that it ended.

multiprocessing would import the caller's script anew, torch and all, and run it where it has no ``__main__`` guard.
Ctrl-C reaches every process of a terminal: a child is deaf to it, and whoever started it ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from signal import Signals
from typing import Any

from trimtab import errors

KILLED = -9
"""What a process ends with that the system killed. By number, since Windows knows no SIGKILL."""

_CODE = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
importlib.import_module("trimtab.child").end_with_parent()
importlib.import_module(sys.argv[2]).main()
"""


class NoAnswer(Exception):
    """A child failed in a way that nobody foresaw, or ended. Its text goes on from a name of the child.

    Attributes:
        memory: Whether memory ran out.
    """

    def __init__(self, how: str, memory: bool, advice: str) -> None:
        super().__init__(how)
        self.memory = memory
        self._advice = advice

    def line(self, child: str, room: str) -> str:
        """The whole message: what failed, how, and what to do; ``room`` where memory ran out."""
        return f"{child} {self}: {room if self.memory else self._advice}"


class Child:
    """A process that runs ``main`` of a module, which calls `serve`. To be used in a ``with``, whose end is its own.

    Args:
        module: Its name.
    """

    def __init__(self, module: str) -> None:
        self._process = start(module)

    def ask(self, question: Any) -> Any:
        """What its function answers; both are what JSON can say.

        Raises:
            TrimtabError: The function did, of the same kind.
            NoAnswer: It failed otherwise, or the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line.endswith("\n"):
            code = self._process.wait()
            raise NoAnswer(how_it_ended(code), code == KILLED, "see what it said above")
        answer = json.loads(line)
        if "kind" in answer:
            kind = getattr(errors, answer["kind"])
            raise (errors.TrimtabError if kind is errors.MissingDependency else kind)(answer["failed"])
        if "failed" in answer:
            trace = _Trace(answer["trace"])
            raise NoAnswer(answer["failed"], answer["memory"], "run it with --debug") from trace
        return answer["done"]

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class _Trace(Exception):
    """Where in the child an error was raised, for --debug."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def start(module: str, **options: Any) -> subprocess.Popen[str]:
    """Starts ``main`` of a module in a process whose stdin and stdout are pipes of text.

    Args:
        module: Its name, on this process's own path.
        options: Of ``subprocess.Popen``.
    """
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, json.dumps(sys.path), module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        **options,
    )


def end_with_parent() -> None:
    """In a child: has it end soon after the process that started it, which may be killed and close nothing.

    Linux's PR_SET_PDEATHSIG would not do: it ends a child with the thread that started it.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(function: Callable[[Any], Any]) -> None:
    """In a child: answers questions until there are no more."""
    # Libraries write to stdout as they like: what they say goes to stderr.
    with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(json.dumps(_answered(function, json.loads(line))) + "\n")


def _answered(function: Callable[[Any], Any], question: Any) -> dict[str, Any]:
    try:
        return {"done": function(question)}
    except errors.TrimtabError as error:
        return {"failed": str(error), "kind": type(error).__name__}
    except Exception as error:
        memory = isinstance(error, MemoryError)
        how = (
            "ran out of memory" if memory else f"failed ({type(error).__name__}: {errors.first_line(error)})"
        )
        return {"failed": how, "memory": memory, "trace": traceback.format_exc()}


def how_it_ended(code: int) -> str:
    """What a process did that ended with a code; below 0 are signals."""
    if code == KILLED:
        return "was killed, as the system does when memory runs out"
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):  # not all have names
        return f"was ended by {Signals(-code).name}"
    return f"was ended by signal {-code}"
