"""Atomic file writes, and who may write to a file."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "TEMPORARY_PREFIX",
    "atomic_file",
    "check_writable",
    "not_private_reason",
    "write_atomically",
]

TEMPORARY_PREFIX = ".unfinished-"


def check_writable(path: Path) -> None:
    """
    Whether a file can be written, found out before there is anything to write.

    :param path: of a file, which may not exist, or of a folder for it
    :raises OSError: if it is a device or a pipe, or its folder cannot be made or written to
    """
    _refuse_devices(path)
    nearest = next(x for x in (path if path.is_dir() else path.parent, *path.parents) if x.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {nearest} cannot be written to")


def _refuse_devices(path: Path) -> None:
    """A file would take the place of the device, for every program."""
    is_device = path.exists() and not (path.is_file() or path.is_dir())
    if is_device or path.absolute().parent == Path(os.devnull).parent:
        raise OSError(f"{path} is a device or a pipe; name a file")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """
    Yields another path to write to. On a clean exit that file takes the place of ``path``, after
    its content is on the disk; no reader, and no crash, ever sees a part of it. A link in that
    place is replaced, not followed.

    :raises OSError: if the folder cannot be written to, or ``path`` is a device or a pipe; an
        existing file is left as it was
    """
    _refuse_devices(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    # The system applies the umask, as it does for `open`. O_EXCL refuses links as well.
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own in this place, with mode 0600
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """
    Write a text file by `atomic_file`.

    :raises OSError: see there
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    """Bring a new name to the disk, where the system can: a crash could lose it otherwise."""
    with contextlib.suppress(OSError):  # Windows opens no folders; some file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def not_private_reason(path: Path) -> str | None:
    """
    :param path: of a file or folder that exists
    :return: why others than this user may have written to it, or None. Always None on systems
        without POSIX users
    :raises OSError: if it is not there
    """
    if not hasattr(os, "getuid"):
        return None
    status = path.stat()
    if status.st_uid != os.getuid():
        return f"{path} belongs to another user (id {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written to by other users; `chmod go-w` it"
    return None
