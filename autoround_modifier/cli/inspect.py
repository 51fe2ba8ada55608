"""`inspect`: what is in a checkpoint, and which engines run it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoround_modifier.cli.kernels import kernels_as_json
from autoround_modifier.cli.options import AsJson, Device
from autoround_modifier.cli.outcome import REFUSED, UsageError
from autoround_modifier.cli.tables import print_json
from autoround_modifier.engines.hardware import device_named

if TYPE_CHECKING:
    from autoround_modifier.engines.answers import EngineSupport
    from autoround_modifier.inspection.checkpoint import CheckpointInspection

__all__ = ["inspect"]

ENGINES = ("vllm", "transformers", "any")
AUTO = "auto"


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="folder of a checkpoint in a format of compressed-tensors, or an unquantized one"
        ),
    ],
    device: Device = AUTO,
    context_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="tokens of a sequence in the key-value cache; default: 4096, or what the model "
            "takes if that is less",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="sequences at the same time")] = 1,
    engine: Annotated[
        str | None,
        typer.Option(
            help="exit with 1 if this engine does not load the checkpoint as it is meant: vllm, "
            "transformers, or any (each of them); with --device on that device, else on any. "
            "Without it, problems are listed, and the exit code is 0"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    What is in a checkpoint, which engines run it, and the commands for that.

    Reads the headers of its files and its configuration, no weights: bits per weight, layers by
    kind, what is not quantized; for each engine the kernel of each scheme on the device, or why
    there is none, the best choice first, with the commands that install, export and serve; memory
    for weights and key-value cache; and what vLLM, SGLang and Transformers refuse or misread, with
    what to change.
    """
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"--engine is `{engine}`; use one of {', '.join(ENGINES)}")
    if device != AUTO:
        try:
            device_named(device)
        except ValueError as error:
            raise UsageError(f"--device: {error}, auto") from error
    from autoround_modifier.cli.logs import own_logs

    with own_logs():
        from autoround_modifier.inspection.checkpoint import inspect_checkpoint

        inspection = inspect_checkpoint(
            checkpoint, device, context_length=context_length, sequences=sequences
        )
    if as_json:
        print_json(_document(inspection))
    else:
        from autoround_modifier.cli.shown_inspection import print_inspection

        print_inspection(inspection, elsewhere=device == AUTO)
    if engine is None:
        return
    loads = inspection.loads if device == AUTO else inspection.loads_here
    if not loads(engine):
        raise typer.Exit(REFUSED)


def _document(inspection: CheckpointInspection) -> dict[str, Any]:
    contents, environment = asdict(inspection.contents), inspection.environment
    for name in ("layers", "unquantized_layers"):  # one for each; `kinds` counts them
        del contents[name]
    contents["schemes"] = [
        {"label": scheme.label, "experts": experts, **asdict(scheme)}
        for scheme, experts in inspection.contents.schemes
    ]
    return {
        "contents": contents,
        "machine": {
            "hardware": str(environment.hardware),
            "name": environment.name,
            "engines": environment.engines,
        },
        "device": str(inspection.device),
        "choices": [_choice(inspection, support) for support in inspection.choices],
        "engines": [
            {
                "engine": elsewhere.engine,
                "installed": environment.engines.get(elsewhere.engine),
                "loads_here": (
                    elsewhere.engine in environment.engines
                    and here.loads
                    and not inspection.misread_by(here.engine)
                ),
                "here": kernels_as_json(here),
                "known_version": elsewhere.version,
                "elsewhere": kernels_as_json(elsewhere),
                "command": (
                    elsewhere.command
                    if elsewhere.loads and not inspection.misread_by(elsewhere.engine)
                    else None
                ),
            }
            for here, elsewhere in zip(inspection.here, inspection.elsewhere, strict=True)
        ],
        "memory": asdict(inspection.memory),
        "problems": [
            {"checked_for": engine, **asdict(problem)}
            for engine, problems in inspection.problems.items()
            for problem in problems
        ],
        "loads_as_meant": {
            engine: inspection.loads(engine) if engine in inspection.problems else None
            for engine in ENGINES[:2]
        },
    }


def _choice(inspection: CheckpointInspection, support: EngineSupport) -> dict[str, Any]:
    """:return: an engine that runs the checkpoint on the device"""
    serving, memory = support.serving[inspection.device], inspection.memory
    return {
        "engine": support.engine,
        "version": support.version,
        "installed": inspection.environment.engines.get(support.engine),
        **asdict(serving),
        "kernels": [asdict(choice) for choice in support.kernels[inspection.device]],
        "weight_bytes": memory.weights_of(support, inspection.device),
        "cache_bytes": memory.cache_of(support),
    }
