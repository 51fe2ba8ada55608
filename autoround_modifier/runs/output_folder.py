"""Whether a model can be saved to a folder, found out before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from autoround_modifier.errors import OutputExistsError
from autoround_modifier.runs.files import TEMPORARY_PREFIX

__all__ = ["check_output_folder", "holds_files"]


def check_output_folder(folder: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    """
    Nothing is created.

    :param folder: where a model is to be saved
    :param overwrite: it may hold files
    :param sources: folders from which the model was, or still is, read
    :raises OutputExistsError: if it holds files and ``overwrite`` is false, other than those that
        a process left which was killed while it saved; always if it is a file, or is one of the
        sources, contains one or lies inside of one, by whatever path
    :raises NotADirectoryError: if it is below a file
    :raises PermissionError: if it cannot be written to, or cannot be made
    """
    resolved = folder.resolve()
    for source in sources:
        if resolved in (source.resolve(), *source.resolve().parents):
            raise OutputExistsError(
                f"`output_dir` {folder} holds the model that is quantized ({source}), which would "
                "be overwritten while it is read; choose another `output_dir`"
            )
        if source.resolve() in resolved.parents:
            raise OutputExistsError(
                f"`output_dir` {folder} lies inside of the model that is quantized ({source}); "
                "choose another `output_dir`"
            )
    if resolved.is_file():
        raise OutputExistsError(f"`output_dir` {folder} is a file; choose another `output_dir`")
    if resolved.is_dir() and not overwrite and holds_files(resolved):
        raise OutputExistsError(
            f"{folder} exists and is not empty; choose another `output_dir`, or pass "
            "`overwrite_output_dir=True`"
        )
    nearest = next(path for path in (resolved, *resolved.parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"`output_dir` {folder}: {nearest} is a file; choose another `output_dir`"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"`output_dir` {folder}: {nearest} cannot be written to; choose another `output_dir`"
        )


def holds_files(folder: Path) -> bool:
    """:return: whether there are others than those that a process left which was killed"""
    return any(not path.name.startswith(TEMPORARY_PREFIX) for path in folder.iterdir())
