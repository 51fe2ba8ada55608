"""Atomic file writes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["TEMPORARY_PREFIX", "atomic_file", "write_atomically"]

TEMPORARY_PREFIX = ".unfinished-"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """
    Yields another path to write to. On a clean exit that file takes the place of ``path``, after
    its content is on the disk; no reader, and no crash, ever sees a part of it.

    :raises OSError: if the folder cannot be written to; an existing file is left as it was
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY_PREFIX)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # as `open` would have made it
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """
    Write a text file by `atomic_file`.

    :raises OSError: see there
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
