"""`release`: several checkpoints of one model, by one file."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="only warnings and errors")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="all that is logged")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """
    Quantize a model by several recipes, evaluate the checkpoints, keep those that reach what the
    file demands, and write and publish their cards.

    It stops at any failure; the same command goes on after the last step that ended. The exit code
    is 1 if no checkpoint reaches what is demanded.
    """
    from autoround_modifier.cli.logs import DEBUG, ERROR, INFO, own_logs
    from autoround_modifier.cli.outcome import REFUSED, UsageError
    from autoround_modifier.cli.progress import RunProgress

    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other")
    with own_logs(DEBUG if verbose else ERROR if quiet else INFO) as console:
        from autoround_modifier.release.file import read_release
        from autoround_modifier.release.pipeline import run_release

        wanted = read_release(file)
        if tiny:
            wanted = wanted.tiny()
        with contextlib.nullcontext() if quiet else RunProgress(console) as progress:
            made = run_release(wanted, progress, dry_run)
    if dry_run:
        names = [entry.name for entry in wanted.checkpoints]
        facts = json.dumps({"checkpoints": names})
        typer.echo(facts if as_json else f"{file} can be made: {', '.join(names)}")
        return
    if as_json:
        typer.echo(json.dumps([one.facts() for one in made]))
    else:
        for one in made:
            typer.echo(str(one))
    if all(one.shortfalls for one in made):
        raise typer.Exit(REFUSED)
