"""Whether this process is the command line, and what it was started with."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

__all__ = ["COMMAND", "command_line", "quoted_command_line", "runs_as_command"]

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


def command_line() -> list[str] | None:
    """:return: what this process was started with, where it is the command line"""
    return [COMMAND, *sys.argv[1:]] if runs_as_command() else None


def quoted_command_line() -> str | None:
    """:return: the same as text, quoted for a shell"""
    line = command_line()
    return None if line is None else shlex.join(line)
