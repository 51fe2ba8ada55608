"""`recipes`: the recipes that the package ships."""

from __future__ import annotations

import typer

from autoround_modifier.cli.outcome import reported

__all__ = ["app"]

app = typer.Typer(help="List, show and start recipes.", no_args_is_help=True)


@app.command("list")
@reported
def list_recipes() -> None:
    """Names of the shipped recipes."""
    from autoround_modifier.recipes import list_recipes

    for name in list_recipes():
        typer.echo(name)
