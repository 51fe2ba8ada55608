"""Runs one measurement in a process of its own, so that its time and peak memory are its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

__all__ = ["current_rss", "report", "run_child"]

PREFIX = "RESULT "


def report(result: dict) -> None:
    """Called by the child: hand the result to `run_child`."""
    print(PREFIX + json.dumps(result))


def run_child(*arguments: str) -> dict:
    """
    :param arguments: the script and its arguments
    :return: what the child reported
    :raises RuntimeError: if it failed; its own messages are on the standard error
    """
    child = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    lines = [line for line in child.stdout.splitlines() if line.startswith(PREFIX)]
    if child.returncode or len(lines) != 1:
        raise RuntimeError(f"failed with exit code {child.returncode}: {' '.join(arguments)}")
    return json.loads(lines[0].removeprefix(PREFIX))


def current_rss() -> int:
    """:return: resident bytes of this process (Linux)"""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
