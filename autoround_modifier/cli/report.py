"""`report`: one HTML page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    checkpoint: Annotated[Path, typer.Argument(help="folder that `quantize` wrote")],
    output: Annotated[
        Path | None,
        typer.Option(help="file to write; quantization_report.html in the checkpoint unless given"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="write over a file that is no such page")
    ] = False,
    show: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
) -> None:
    """Make one HTML page of a run: losses, bits, errors, time, generations."""
    from autoround_modifier.report.page import write_page

    path = write_page(checkpoint, output, overwrite)
    typer.echo(path)
    if show:
        typer.launch(path.resolve().as_uri())
