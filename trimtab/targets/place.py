"""Where engines are kept; for the command line too, so nothing is imported here."""

from __future__ import annotations

from pathlib import Path

Place = str | Path | None
"""Of a cache: a folder, a URL, or none."""

DEFAULT_CACHE = "~/.cache/trimtab"
"""The cache of whoever names none, and the folder in front of a URL."""
