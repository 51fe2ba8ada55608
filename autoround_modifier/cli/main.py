"""The command line `autoround-modifier`: its commands."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NoReturn

import typer

from autoround_modifier.cli import recipes
from autoround_modifier.cli.card import card
from autoround_modifier.cli.compare import compare
from autoround_modifier.cli.evaluate import evaluate
from autoround_modifier.cli.export import export
from autoround_modifier.cli.inspect import inspect
from autoround_modifier.cli.outcome import DONE, reported
from autoround_modifier.cli.plan import plan
from autoround_modifier.cli.push import push
from autoround_modifier.cli.quantize import quantize
from autoround_modifier.cli.release import release
from autoround_modifier.cli.report import report
from autoround_modifier.cli.schemes import schemes
from autoround_modifier.command import COMMAND
from autoround_modifier.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name=COMMAND,
    help="Quantize language models to 2 to 8 bits with SignRound (AutoRound), and publish them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        # flags may be written with underscores, as fields are
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)

# In the order in which they are used: a command is one function, a group is an app of its own.
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "quantize": quantize,
    "inspect": inspect,
    "evaluate": evaluate,
    "report": report,
    "card": card,
    "push": push,
    "export": export,
    "compare": compare,
    "release": release,
    "schemes": schemes,
}
GROUPS: dict[str, typer.Typer] = {"recipes": recipes.app}
for _name, _command in COMMANDS.items():
    app.command(_name)(reported(_command))
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit(DONE)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """
    :param arguments: of the command line; None for those of the process
    :return: exit code: 0 done, 1 refused, 2 wrong usage, 3 failed while running
    """
    try:
        with _terminated_like_interrupted():
            app(arguments, prog_name=COMMAND)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE
    return DONE


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """What ends a process of a container or a job (SIGTERM) lets it clean up, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
