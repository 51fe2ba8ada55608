"""Tables and JSON documents on standard output."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer

__all__ = ["print_json", "print_table"]

PIPED_WIDTH = 1000


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Sequence[str] = (),
    title: str | None = None,
) -> None:
    """
    On a terminal, cells are wrapped to its width; in a pipe, each row is one line.

    :param columns: their titles
    :param rows: cells as text
    :param numbers: columns that are aligned to the right
    :param title: above it
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED_WIDTH
    Console(file=sys.stdout, width=width, markup=False, highlight=False).print(table)
