"""Claim: trimtab itself costs next to nothing, at the start and in every step.

    python benchmarks/overhead.py [--json]

Prints what Python does in a step beside the engine calls (goal: at most 1 ms), the time of `trimtab --help`
(goal: at most 0.3 s) and of `import trimtab` (goal: at most 0.2 s), and that neither imports torch. Every
number is the median of several fresh processes, with the smallest and the largest beside it.

The share of a step is measured on a tiny Stable Diffusion, compiled here, whose step makes the same calls as
the real one's: what Python does does not grow with the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import models
from step import spread

GOALS = {"step_ms": 1.0, "help_s": 0.3, "import_s": 0.2}

_IMPORT = """
import time
start = time.perf_counter()
import trimtab
seconds = time.perf_counter() - start
start = time.perf_counter()
trimtab.load
import sys
print(seconds, time.perf_counter() - start, "torch" in sys.modules)
"""

_HELP = """
import contextlib, io, sys
from trimtab.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
print("torch" in sys.modules)
"""


def measure(processes: int, bundle: Path) -> dict[str, Any]:
    """Everything that is printed; ``bundle`` is any that draws from a prompt."""
    from trimtab.runtime.bench import bench

    starts = [_python("-c", "pass")[0] for _ in range(processes)]
    helps = [_python("-m", "trimtab", "--help")[0] for _ in range(processes)]
    imports = [_python("-c", _IMPORT)[1].split() for _ in range(processes)]
    shares = [bench([bundle], rounds=3)["bundles"][0]["python_ms"] for _ in range(processes)]
    return {
        "step_ms": spread(shares),
        "help_s": spread(helps),
        "import_s": spread([float(line[0]) for line in imports]),
        "import_load_s": spread([float(line[1]) for line in imports]),
        "python_s": spread(starts),
        "torch": _python("-c", _HELP)[1].strip() == "True" or any(line[2] == "True" for line in imports),
        "goals": GOALS,
        "command": " ".join(["python", *sys.argv]),
        "python": sys.version.partition(" ")[0],
    }


def _python(*arguments: str) -> tuple[float, str]:
    """Wall seconds of a fresh interpreter, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def _show(result: dict[str, Any]) -> None:
    names = {
        "step_ms": "python in a step, ms",
        "help_s": "trimtab --help, s",
        "import_s": "import trimtab, s",
        "import_load_s": "... and trimtab.load, s",
        "python_s": "python itself, s",
    }
    for key, name in names.items():
        values = result[key]
        goal = f"  (goal: {GOALS[key]})" if key in GOALS else ""
        print(f"{name:26}{values['median']:8.3f}  [{values['min']:.3f} .. {values['max']:.3f}]{goal}")
    print(f"{'torch is imported':26}{'yes' if result['torch'] else 'no':>8}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, default=7, help="fresh processes for each number (default 7)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, bundle = Path(folder, "tiny"), Path(folder, "tiny.bundle")
        models.make(source, "none")
        subprocess.run(
            [sys.executable, "-m", "trimtab", "compile", str(source), "-o", str(bundle)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        result = measure(arguments.processes, bundle)
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(result)


if __name__ == "__main__":
    main()
