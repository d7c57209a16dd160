"""Claim: a picture whose prompt is short takes less than one whose text is filled up to the most tokens.

    python benchmarks/texts.py BUNDLE [--rounds 3] [--json]

Of a bundle whose texts have an open length (PixArt, Sana, Z-Image) a second one is made that fills every text up, as
diffusers does; weights are copied beside it, into a temporary folder. `trimtab bench` draws with both in turn, each
in a process of its own, and what it prints is printed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from trimtab.bundle import open_bundle
from trimtab.calibration.draft import draft, with_whole_texts
from trimtab.storage import read_program


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.bundle.resolve().parent) as temporary:
        filled = Path(temporary, "filled.bundle")
        program = read_program(open_bundle(options.bundle))
        whole = with_whole_texts(program)
        if whole.tasks == program.tasks:
            raise SystemExit(
                f"the texts of {options.bundle} have a length of their own: nothing is filled up"
            )
        draft(whole, filled).close()
        command = [sys.executable, "-m", "trimtab", "bench", str(options.bundle), "--against", str(filled)]
        command += ["--rounds", str(options.rounds), *(["--json"] if options.json else [])]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
