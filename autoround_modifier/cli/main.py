"""The command line `autoround-modifier`: its commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from autoround_modifier.cli import recipes
from autoround_modifier.cli.outcome import DONE, reported
from autoround_modifier.cli.plan import plan
from autoround_modifier.cli.start import COMMAND
from autoround_modifier.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name=COMMAND,
    help="Quantize language models to 2 to 8 bits with SignRound (AutoRound), and publish them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# In the order in which they are used: a command is one function, a group is an app of its own.
COMMANDS: dict[str, Callable[..., None]] = {"plan": plan}
GROUPS: dict[str, typer.Typer] = {"recipes": recipes.app}
for _name, _command in COMMANDS.items():
    app.command(_name)(reported(_command))
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit(DONE)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    :param arguments: of the command line; None for those of the process
    :return: exit code: 0 done, 1 refused, 2 wrong usage, 3 failed while running
    """
    try:
        app(arguments, prog_name=COMMAND)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE
    return DONE
