"""Types of command-line arguments that several files of commands share."""

from __future__ import annotations

import argparse

from trimtab.errors import InputError


def size(text: str) -> tuple[int, int]:
    """WxH as (W, H) in pixels, for argparse."""
    from trimtab.recipe import parse_size

    try:
        return parse_size(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
