"""`card`: a model card of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["card"]


def card(
    checkpoint: Annotated[Path, typer.Argument(help="folder that `quantize` wrote")],
    output: Annotated[
        Path | None, typer.Option(help="file to write; README.md in the checkpoint unless given")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="write over a file that is no such card")
    ] = False,
    repo: Annotated[
        str | None,
        typer.Option(help="OWNER/NAME under which the checkpoint will be published"),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="OWNER/NAME of the original on the hub")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="as the hub spells it, such as apache-2.0")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="code such as en; may be given several times")
    ] = None,
) -> None:
    """
    Make a model card from the report and the evaluation of a checkpoint.

    A part without data is left out, and named.
    """
    from autoround_modifier.report.card import CardOptions, write_card

    options = CardOptions(repo, base_model, license, tuple(language or ()))
    path, made = write_card(checkpoint, options, output, overwrite)
    typer.echo(path)
    for name, reason in made.left_out:
        typer.echo(f"left out: {name} ({reason})", err=True)
