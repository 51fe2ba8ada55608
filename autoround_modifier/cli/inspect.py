"""`inspect`: what is in a checkpoint, and which engines load it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoround_modifier.cli.kernels import kernels_as_json, print_kernels
from autoround_modifier.cli.options import AsJson
from autoround_modifier.cli.outcome import REFUSED, UsageError
from autoround_modifier.cli.tables import print_json, print_table
from autoround_modifier.readable import bytes_text

if TYPE_CHECKING:
    from autoround_modifier.checkpoints.inspection import CheckpointInspection
    from autoround_modifier.engines.support import EngineSupport, Hardware

__all__ = ["inspect"]

ENGINES = ("vllm", "transformers", "any")


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="folder of a checkpoint in a format of compressed-tensors, or an unquantized one"
        ),
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            help="exit with 1 if this engine does not load the checkpoint as it is meant: vllm, "
            "transformers, or any (each of them). Without it, problems are listed, and the exit "
            "code is 0"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """
    What is in a checkpoint, and which engines load it.

    Reads the headers of its files and its configuration, no weights: bits per weight, layers by
    kind, what is not quantized; for vLLM, SGLang and Transformers the kernel of each scheme on this
    machine and elsewhere, and the command that serves it; and what these engines refuse or misread,
    with what to change.
    """
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"--engine is `{engine}`; use one of {', '.join(ENGINES)}")
    from autoround_modifier.cli.logs import own_logs

    with own_logs():
        from autoround_modifier.checkpoints.inspection import inspect_checkpoint

        inspection = inspect_checkpoint(checkpoint)
    if as_json:
        print_json(_document(inspection))
    else:
        _print_contents(inspection)
        _print_engines(inspection)
        _print_problems(inspection)
    if engine is not None and not inspection.loads(engine):
        raise typer.Exit(REFUSED)


def _document(inspection: CheckpointInspection) -> dict[str, Any]:
    contents, machine = asdict(inspection.contents), inspection.machine
    contents["schemes"] = [
        {"label": scheme.label, "experts": experts, **asdict(scheme)}
        for scheme, experts in inspection.contents.schemes
    ]
    return {
        "contents": contents,
        "machine": {
            "hardware": str(machine.hardware),
            "name": machine.name,
            "engines": machine.engines,
        },
        "engines": [
            {
                "engine": elsewhere.engine,
                "installed": machine.engines.get(elsewhere.engine),
                "loads_here": (
                    elsewhere.engine in machine.engines
                    and here.loads
                    and not inspection.misread_by(here.engine)
                ),
                "here": kernels_as_json(here),
                "known_version": elsewhere.version,
                "elsewhere": kernels_as_json(elsewhere),
                "command": elsewhere.command if elsewhere.loads else None,
            }
            for here, elsewhere in zip(inspection.here, inspection.elsewhere, strict=True)
        ],
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


def _print_contents(inspection: CheckpointInspection) -> None:
    contents = inspection.contents
    typer.echo(f"{contents.folder}: {contents.architecture or 'architecture not named'}")
    typer.echo(f"  format            {contents.format}")
    if contents.quantized_bits is not None:
        typer.echo(
            f"  quantized layers  {contents.quantized_bits:.3f} bits per weight, scales and zero "
            f"points included; {contents.quantized_weights:,} weights"
        )
    typer.echo(
        f"  whole model       {contents.bits_per_weight:.3f} bits per weight; "
        f"{contents.weights:,} weights"
    )
    files = "file" if contents.files == 1 else "files"
    typer.echo(
        f"  on disk           {bytes_text(contents.file_bytes)}; tensors "
        f"{bytes_text(contents.bytes)} in {contents.files} safetensors {files}"
    )
    typer.echo(f"  key-value cache   {contents.kv_cache or 'not quantized'}")
    if contents.mtp_layers:
        typer.echo(
            f"  MTP layers        {contents.mtp_layers} by config.json; {contents.mtp_tensors} "
            "tensors of them in the files"
        )
    if contents.recipe is not None:
        typer.echo("  recipe            recipe.yaml")
    for note in contents.notes:
        typer.echo(f"  note              {note}")
    typer.echo()
    print_table(
        ("layers", "scheme", "number", "weights", "bits per weight", "size"),
        [
            (
                kind.kind,
                kind.scheme,
                f"{kind.layers:,}",
                f"{kind.weights:,}",
                f"{kind.bits_per_weight:.3f}" if kind.weights else "",
                bytes_text(kind.bytes),
            )
            for kind in contents.kinds
        ],
        ("number", "weights", "bits per weight", "size"),
    )
    if contents.is_quantized and contents.unquantized:
        typer.echo("Not quantized:")
        for name, count in contents.unquantized.items():
            typer.echo(f"  {name}" + (f" ({count})" if count > 1 else ""))
        typer.echo()


def _print_engines(inspection: CheckpointInspection) -> None:
    machine = inspection.machine
    typer.echo(f"On this machine ({_machine_name(inspection)}):")
    for here, known in zip(inspection.here, inspection.elsewhere, strict=True):
        version = machine.engines.get(here.engine)
        installed = f"{version}" if version else "(not installed)"
        (hardware,) = here.kernels
        if not here.loads_on(hardware):
            outcome = f"{'does' if version else 'would'} not load it: {'; '.join(here.reasons)}"
        elif inspection.misread_by(here.engine):
            outcome = f"{'does' if version else 'would'} not load it as it is meant: see below"
        else:
            outcome = ("loads it" if version else "would load it") + _kernels_on(here, hardware)
        if version and not f"{version}.".startswith(f"{known.version}."):
            outcome += f" (as far as {known.version} tells)"
        typer.echo(f"  {here.engine} {installed} {outcome}")
    typer.echo()
    if inspection.contents.schemes:
        typer.echo("Elsewhere:")
        print_kernels(inspection.elsewhere)
        typer.echo()
    typer.echo("To serve it:")
    for support in inspection.elsewhere:
        if support.loads and not inspection.misread_by(support.engine):
            lines = support.command.splitlines()
            typer.echo("".join(f"  {line}\n" for line in lines), nl=False)
    typer.echo()


def _machine_name(inspection: CheckpointInspection) -> str:
    hardware, name = str(inspection.machine.hardware), inspection.machine.name
    return hardware if name == hardware else f"{name}, {hardware}"


def _kernels_on(support: EngineSupport, hardware: Hardware) -> str:
    """:return: the end of a sentence"""
    named = [
        f"{choice.scheme}{' experts' if choice.experts else ''} by {choice.kernel}"
        + (f" ({choice.note})" if choice.note else "")
        for choice in support.kernels[hardware]
    ]
    return f": {', '.join(named)}" if named else ""


def _print_problems(inspection: CheckpointInspection) -> None:
    for engine in ENGINES[:2]:
        problems = inspection.problems.get(engine)
        if problems is None:
            typer.echo(f"Not checked for {engine}, which does not know the model here.")
        elif not problems:
            typer.echo(f"Checked for {engine}: no problem with names, shapes and schemes.")
        for problem in problems or ():
            typer.echo(f"{'Problem' if problem.fatal else 'Note'}: {problem}")
