"""Keeps stdout for results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = ["logs_to_stderr"]


@contextlib.contextmanager
def logs_to_stderr() -> Iterator[None]:
    """
    Print to stderr what libraries would print to stdout. LLM-Compressor logs for good to what is
    stdout while it is imported, so that imports of it belong into this context as well.
    """
    with contextlib.redirect_stdout(sys.stderr):
        yield
