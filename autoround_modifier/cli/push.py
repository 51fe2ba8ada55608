"""`push`: upload a checkpoint to Hugging Face or ModelScope."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["push"]


def push(
    checkpoint: Annotated[Path, typer.Argument(help="folder of the checkpoint")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub")],
    platform: Annotated[
        str | None,
        typer.Option(
            help="huggingface (hf) or modelscope (model_scope); without it, what "
            "AUTOROUND_USE_MODELSCOPE says"
        ),
    ] = None,
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
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
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
    typer.echo(json.dumps(asdict(uploaded)) if as_json else f"uploaded to {uploaded.url}")
