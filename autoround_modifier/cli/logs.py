"""What is logged, as a command shows it."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from loguru import logger
from rich.console import Console

__all__ = ["log_to_console"]


def log_to_console(quiet: bool, verbose: bool) -> Console:
    """
    Send logs to stderr: warnings and errors; with ``verbose``, everything.

    :return: the console of stderr
    """
    console = Console(stderr=True)

    def write(message: str) -> None:
        console.print(message.rstrip(), markup=False, highlight=False, soft_wrap=True)

    logger.remove()
    if verbose:
        logger.add(write, level="DEBUG", format="{time:HH:mm:ss} {level.name.lower} {message}")
        return console
    level = "ERROR" if quiet else "WARNING"
    logger.add(write, level=level, format=_one_line, filter=_is_for_users)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return console


def _one_line(record: Any) -> str:
    return "{level.name}: {message}\n"


def _is_for_users(record: Any) -> bool:
    """LLM-Compressor warns on every machine without an accelerator."""
    return "No accelerator available" not in record["message"]
