"""``python -m trimtab``, and the command ``trimtab``: Ctrl-C ends it in one line, from its first import on."""

import atexit
import signal
import sys


def _deafen() -> None:
    """What was said is what counts: a signal while Python puts its modules away changes no exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """Runs the command line; gives its exit code."""
    try:
        from trimtab.cli import main as run

        code = run()
    except KeyboardInterrupt:  # before a command was known, and so before anything was written
        if "--debug" in sys.argv:
            raise
        print("trimtab: error: interrupted: nothing was written", file=sys.stderr)
        code = 1
    atexit.register(_deafen)
    # CPython ends `python -m` by SIGINT, whatever its exit code, where one came while a text was executed, as every
    # dataclass is when it is imported, and though it was caught since; the next text makes it forget that
    # (_Py_UnhandledKeyboardInterrupt in Python/pythonrun.c).
    exec("")
    return code


if __name__ == "__main__":
    sys.exit(main())
