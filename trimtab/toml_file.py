"""TOML files, which people write: recipes, plans, devices, descriptions of .onnx files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from trimtab.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain data.

    Raises:
        InputError: There is no such file, it cannot be read, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give a TOML file that does") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a TOML file that can") from None
    except ValueError as error:
        raise InputError(f"{path} cannot be read as TOML ({error}): mend it") from None
