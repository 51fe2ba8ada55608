"""Whether this process is the command line."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["COMMAND", "runs_as_command"]

COMMAND = "autoround-modifier"
_PACKAGE = "autoround_modifier"


def runs_as_command() -> bool:
    """
    Asked while the package is imported.

    :return: whether the process was started as ``autoround-modifier`` or as
        ``python -m autoround_modifier``, rather than by a program that imports the package
    """
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # Python is still looking for the module that it was asked to run
        arguments = sys.orig_argv
        return _PACKAGE in arguments[arguments.index("-m") + 1 :][:1]
    return Path(program).stem == COMMAND
