"""One process at a time writes to a folder of finished blocks."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from loguru import logger

from autoround_modifier.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_FILE", "FolderLock", "in_use", "is_in_use"]

LOCK_FILE = "run.lock"

# The locks of this process, by device and inode of the file. The operating system counts locks by
# open file: without this, a run that is started again after Ctrl-C would find its own lock.
_held: dict[tuple[int, int], FolderLock] = {}


class FolderLock:
    """
    A lock of the operating system (``flock``) on ``run.lock``. It ends with the process, however
    the process ends, and the file stays. The same process may take a lock that it holds; then the
    earlier `FolderLock` holds it no longer. There is no lock where Python has no ``fcntl``
    (Windows), nor, after a warning, on file systems that cannot lock.

    :param folder: exists
    :raises CheckpointError: if another process holds the lock; names the process
    :raises OSError: if the file cannot be opened, or is a link
    """

    def __init__(self, folder: Path):
        self._file: IO[str] | None = None
        self._process = os.getpid()
        self._key = (0, 0)
        if fcntl is None:
            return
        path = folder / LOCK_FILE
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.fdopen(os.open(path, flags, 0o666), "r+", errors="replace")
        status = os.fstat(file.fileno())
        self._key = (status.st_dev, status.st_ino)
        earlier = _held.get(self._key)
        if earlier is not None and earlier._process == self._process:
            file.close()
            self._file, earlier._file = earlier._file, None
        elif self._lock(file, folder):
            self._file = file
        else:
            file.close()
            return
        _held[self._key] = self

    def _lock(self, file: IO[str], folder: Path) -> bool:
        """:return: false if the file system has no locks"""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = file.read().strip() or "unknown"
                file.close()
                raise CheckpointError(
                    f"checkpoint_dir {folder} is in use by another process ({holder}). Wait until "
                    "it ends, or choose another folder."
                ) from None
            logger.warning(
                f"checkpoint_dir {folder} cannot be locked ({error.strerror}): do not start a "
                "second run on it"
            )
            return False
        file.truncate(0)
        file.write(f"process {self._process} on {socket.gethostname()}\n")
        file.flush()
        return True

    def release(self) -> None:
        """Let others have the lock; nothing happens if this holds it no longer."""
        if self._file is not None and self._process == os.getpid():
            del _held[self._key]
            self._file.close()
            self._file = None


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """
    Until the end, or until the process ends, `is_in_use` tells others that this process writes into
    the folder; not on systems and file systems that cannot lock.

    :param folder: exists
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_in_use(folder: Path) -> bool:
    """:return: whether a process on this machine writes into a folder, by `in_use`"""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # that process has ended since
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(descriptor)
    return False
