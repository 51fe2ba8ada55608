"""Files that a command writes again, and never over a file of somebody else."""

from __future__ import annotations

from pathlib import Path

from autoround_modifier.errors import OutputExistsError
from autoround_modifier.runs.files import write_atomically

__all__ = ["check_own", "write_own"]


def write_own(path: Path, text: str, mark: str, overwrite: bool) -> None:
    """
    :param mark: stands in each file that the command writes, also in this one
    :param overwrite: write over a file without it
    :raises OutputExistsError: if there is a file without the mark, and `overwrite` is false
    :raises OSError: if the file cannot be written
    """
    check_own(path, mark, overwrite)
    if mark not in text:
        raise ValueError(f"the text for {path} lacks its mark")
    write_atomically(path, text)


def check_own(path: Path, mark: str, overwrite: bool) -> None:
    """:raises OutputExistsError: see `write_own`"""
    if overwrite or not path.exists():
        return
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder; name a file")
    if mark not in path.read_text(encoding="utf-8", errors="replace"):
        raise OutputExistsError(
            f"{path} is there already and was not written by this command; name another file with "
            "`--output`, or write over it with `--overwrite`"
        )
