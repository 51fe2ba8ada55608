"""What the log says of a run that has stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from loguru import logger

__all__ = ["say_what_is_left"]


@contextlib.contextmanager
def say_what_is_left(message: str) -> Iterator[None]:
    """:param message: logged if an error, or Ctrl-C, ends what runs inside"""
    try:
        yield
    except BaseException:  # Ctrl-C among them
        logger.error(message)
        raise
