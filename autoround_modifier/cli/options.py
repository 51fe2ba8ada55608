"""Flags that several commands have, each with one name and one text."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["AsJson", "Device", "Platform", "Quiet", "TrustRemoteCode", "Verbose"]

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document")]
Device = Annotated[
    str,
    typer.Option(
        help="auto, sm75, sm80, sm89, sm90, sm100, sm120, cpu, rocm, xpu or metal: where it is to "
        "run; auto is this machine"
    ),
]
Platform = Annotated[
    str | None,
    typer.Option(
        help="hub: huggingface (hf) or modelscope (model_scope); without it, what "
        "AUTOROUND_USE_MODELSCOPE says"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="only warnings and errors")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="let models run their own code")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="all that is logged")]
