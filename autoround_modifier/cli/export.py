"""`export`: a checkpoint in the format of another family of engines."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from autoround_modifier.cli.tables import print_json

__all__ = ["export"]


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="folder of a compressed-tensors checkpoint of integer weights")
    ],
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="gptq, awq, auto_round, mlx, gguf:auto, or a type of GGUF: gguf:q2_0, tq2_0, "
            "q4_0, q4_1, q5_0, q5_1, q8_0, mxfp4 or nvfp4; or the scheme of GGUF that the "
            "checkpoint was tuned in, such as gguf:q4_k_m",
        ),
    ],
    output: Annotated[
        Path, typer.Argument(help="folder to write; for GGUF the file, which ends in .gguf")
    ],
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="write over the checkpoint in the folder, or the file"),
    ] = False,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            help="for GGUF: folder with llama.cpp's source, whose converter writes metadata and "
            "vocabulary; without it, that of LLAMA_CPP_ROOT"
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            help="for GGUF: another GGUF file of the same model, whose vocabulary is used"
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="for GGUF: f16, bf16, q8_0 or q6_k, to which embeddings and head are rounded; "
            "without it they keep the dtype of the model",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """
    Write a checkpoint in another format, with the same integers, scales and zero points.

    What the format would change is refused before anything is written, with the formats that hold
    it.
    """
    from autoround_modifier.cli.logs import own_logs

    with own_logs():
        from autoround_modifier.exports import exporting

        exported = exporting.export(
            checkpoint,
            format,
            output,
            overwrite=overwrite,
            llama_cpp=llama_cpp,
            vocabulary=vocabulary,
            embeddings=embeddings,
        )
    if as_json:
        print_json({**asdict(exported), "output": str(exported.output)})
        return
    typer.echo(
        f"{exported.output}: {exported.layers} layers in {exported.format}, "
        f"{exported.bytes / 1e6:.1f} MB"
    )
    for note in exported.notes:
        typer.echo(f"note: {note}", err=True)
