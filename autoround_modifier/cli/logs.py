"""What is logged while a command runs: to stderr, in its own words."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

from loguru import logger
from rich.console import Console

__all__ = ["DEBUG", "ERROR", "INFO", "WARNING", "level_of", "own_logs"]

DEBUG, INFO, WARNING, ERROR = "DEBUG", "INFO", "WARNING", "ERROR"


def level_of(quiet: bool, verbose: bool) -> str:
    """:return: from which level on is logged under these flags"""
    return DEBUG if verbose else ERROR if quiet else INFO


@contextlib.contextmanager
def own_logs(level: str = INFO) -> Iterator[Console]:
    """
    Send logs to stderr, of this package from ``level`` on, of others warnings and errors; with
    ``DEBUG`` everything. Progress bars of libraries are not drawn, and what libraries print to
    stdout goes to stderr. Libraries are imported inside: LLM-Compressor sets up logging to stdout.

    :return: the console of stderr
    """
    console = Console(stderr=True)
    logger.remove()
    with contextlib.redirect_stdout(sys.stderr), _no_bars(level):
        # It begins to log, to stdout, and says that there is no accelerator, before it is told how.
        with contextlib.redirect_stdout(sys.stderr if level == DEBUG else io.StringIO()):
            import autoround_modifier.host.lifecycle  # noqa: F401, which imports LLM-Compressor

        logger.remove()
        logger.add(
            lambda text: console.print(
                text.rstrip(), markup=False, highlight=False, soft_wrap=True
            ),
            level=level,
            format=_line,
            filter=None if level == DEBUG else _is_for_users,
        )
        if level == DEBUG:
            yield console
            return
        for name in ("transformers", "torch.fx"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield console


def _line(record: Any) -> str:
    return "{message}\n" if record["level"].name == INFO else "{level.name}: {message}\n"


def _is_for_users(record: Any) -> bool:
    """
    LLM-Compressor tells much, and warns on every machine without an accelerator. What modifiers
    tell of each block is shown as progress.
    """
    important = record["level"].no >= logger.level(WARNING).no
    if important:  # LLM-Compressor's level METRIC is above that of warnings
        return record["level"].name != "METRIC" and "No accelerator" not in record["message"]
    package, _, room = record["name"].partition(".")
    return package == "autoround_modifier" and not room.startswith("modifiers.")


@contextlib.contextmanager
def _no_bars(level: str) -> Iterator[None]:
    if level == DEBUG:
        yield
        return
    from tqdm import tqdm

    original = tqdm.__init__

    def disabled(self: tqdm, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    with mock.patch.object(tqdm, "__init__", disabled):
        yield
