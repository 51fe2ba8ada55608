"""`release`: several checkpoints of one model, by one file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from autoround_modifier.cli.options import AsJson, Quiet, Verbose
from autoround_modifier.cli.tables import print_json

__all__ = ["release"]


def release(
    file: Annotated[Path, typer.Argument(help="YAML file, as in examples/release")],
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny",
            help="try all steps on next to nothing, in a folder of its own; nothing is published",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only check the file")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """
    Quantize a model by several recipes, evaluate the checkpoints, keep those that reach what the
    file demands, and write and publish their cards.

    It stops at any failure; the same command goes on after the last step that ended. The exit code
    is 1 if no checkpoint reaches what is demanded.
    """
    from autoround_modifier.cli.logs import level_of, own_logs
    from autoround_modifier.cli.outcome import REFUSED, UsageError
    from autoround_modifier.cli.progress import RunProgress

    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other")
    with own_logs(level_of(quiet, verbose)) as console:
        from autoround_modifier.release.file import read_release
        from autoround_modifier.release.pipeline import run_release

        wanted = read_release(file)
        if tiny:
            wanted = wanted.tiny()
        with contextlib.nullcontext() if quiet else RunProgress(console) as progress:
            made = run_release(wanted, progress, dry_run)
    if dry_run:
        names = [entry.name for entry in wanted.checkpoints]
        if as_json:
            print_json({"checkpoints": names})
        else:
            typer.echo(f"{file} can be made: {', '.join(names)}")
        return
    if as_json:
        print_json([one.facts() for one in made])
    else:
        for one in made:
            typer.echo(str(one))
    if all(one.shortfalls for one in made):
        raise typer.Exit(REFUSED)
