"""Libraries that warn of what is meant to be: their loggers, silenced while they work."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def errors_alone(*names: str) -> Iterator[None]:
    """Has loggers say nothing below an error.

    Args:
        names: Of the loggers; those below them are silenced too, unless they have a level of their own.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
