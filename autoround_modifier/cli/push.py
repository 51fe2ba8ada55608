"""`push`: upload a checkpoint to Hugging Face or ModelScope."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from autoround_modifier.cli.options import AsJson, Platform
from autoround_modifier.cli.tables import print_json

__all__ = ["push"]


def push(
    checkpoint: Annotated[Path, typer.Argument(help="folder of the checkpoint")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub")],
    platform: Platform = None,
    private: Annotated[bool, typer.Option(help="make a new repository private")] = False,
    revision: Annotated[
        str | None, typer.Option(help="branch to commit to; without it, the main one")
    ] = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    token: Annotated[
        str | None, typer.Option(help="of the hub; without it, that of the hub's own login")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="upload a checkpoint that an engine would refuse")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a checkpoint and upload it to Hugging Face or ModelScope."""
    from autoround_modifier.cli.logs import own_logs

    with own_logs():
        from autoround_modifier.hub.upload import check_before_upload, upload_checkpoint

        for problem in check_before_upload(checkpoint, force):
            typer.echo(f"warning: {problem}", err=True)
        uploaded = upload_checkpoint(
            checkpoint,
            repository,
            platform=platform,
            private=private,
            revision=revision,
            message=message,
            token=token,
        )
    if as_json:
        print_json(asdict(uploaded))
    else:
        typer.echo(f"uploaded to {uploaded.url}")
