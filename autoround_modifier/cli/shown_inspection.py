"""What `inspect` found, for people to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from autoround_modifier.cli.kernels import print_kernels
from autoround_modifier.cli.tables import print_table
from autoround_modifier.readable import bytes_text

if TYPE_CHECKING:
    from autoround_modifier.engines.answers import EngineSupport
    from autoround_modifier.inspection.checkpoint import CheckpointInspection

__all__ = ["print_inspection"]


def print_inspection(inspection: CheckpointInspection, elsewhere: bool) -> None:
    """:param elsewhere: whether to tell of other hardware too"""
    _print_contents(inspection)
    _print_engines(inspection)
    _print_choices(inspection)
    _print_memory(inspection)
    if elsewhere and inspection.contents.schemes:
        typer.echo("Elsewhere (`--device` tells why there is no kernel):")
        print_kernels(inspection.elsewhere, refused=False)
        typer.echo()
    _print_problems(inspection)


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
    """The kernels on the device, engines that run the checkpoint first."""
    choices = inspection.choices
    names = [x.engine for x in choices]
    others = [x for x in inspection.here if x.engine not in names]
    where = "On this machine" if inspection.is_here else "On another machine"
    print_table(
        ("engine", "installed", "scheme", "kernel, or why there is none", "known"),
        [row for support in (*choices, *others) for row in _rows(inspection, support)],
        title=f"{where} ({_device_name(inspection)}), the best choice first:",
    )


def _rows(
    inspection: CheckpointInspection, support: EngineSupport
) -> Iterator[tuple[str, str, str, str, str]]:
    installed = _installed(inspection, support) if inspection.is_here else ""
    if inspection.misread_by(support.engine):
        yield support.engine, installed, "", "does not load it as it is meant: see below", "checked"
        return
    kernels = support.kernels[inspection.device]
    if not kernels:
        yield support.engine, installed, "not quantized", "its own", ""
    for choice in kernels:
        yield support.engine, installed, choice.layers_text, choice.kernel_text, choice.known


def _installed(inspection: CheckpointInspection, support: EngineSupport) -> str:
    """:return: version; with that of the table, if it is another"""
    version = inspection.environment.engines.get(support.engine)
    known = next(x.version for x in inspection.elsewhere if x.engine == support.engine)
    if version is None:
        return "no"
    told = version[:1].isdigit() and not f"{version}.".startswith(f"{known}.")
    return f"{version}, as {known} tells" if told else version


def _device_name(inspection: CheckpointInspection) -> str:
    hardware, name = str(inspection.device), inspection.environment.name
    return hardware if name == hardware or not inspection.is_here else f"{name}, {hardware}"


def _print_choices(inspection: CheckpointInspection) -> None:
    """The commands, and what would be better if it were installed."""
    choices, engines = inspection.choices, inspection.environment.engines
    for number, support in enumerate(choices):
        serving = support.serving[inspection.device]
        memory = bytes_text(inspection.memory.weights_of(support, inspection.device))
        best = "Best choice: " if number == 0 else ""
        installed = inspection.is_here and support.engine in engines
        typer.echo(
            f"{best}{support.engine}, {memory} of weights in memory"
            + (", installed" if installed else "")
        )
        if not installed:
            typer.echo(f"  {serving.install}")
        note = f"  # {serving.export_note}" if serving.export_note else ""
        if serving.export:
            typer.echo(f"  {serving.export}{note}")
        for line in serving.command.splitlines():
            typer.echo(f"  {line}")
        for choice in support.kernels[inspection.device]:
            if choice.better:
                typer.echo(f"  better: {choice.better}, with pip install {choice.better_package}")
    if not choices:
        typer.echo(f"No engine is known to run it on this device ({inspection.device}).")
    typer.echo()


def _print_memory(inspection: CheckpointInspection) -> None:
    memory = inspection.memory
    typer.echo(
        f"Memory for {memory.sequences} sequence{'s' if memory.sequences > 1 else ''} of "
        f"{memory.context_length:,} tokens, beside what an engine itself needs:"
    )
    packed = f"  weights           {bytes_text(memory.packed)} as saved"
    if memory.unpacked != memory.packed:
        packed += (
            f"; {bytes_text(memory.unpacked)} in Transformers, which unpacks quantized weights to "
            "16 bits"
        )
    typer.echo(packed)
    if memory.cache is not None:
        text = f"  key-value cache   {bytes_text(memory.cache)}: {memory.cache_layers}"
        if memory.cache_in_16_bits not in (None, memory.cache):
            text += f"; {bytes_text(memory.cache_in_16_bits or 0)} in Transformers"
        typer.echo(text)
    for note in memory.notes:
        typer.echo(f"  note              {note}")
    typer.echo()


def _print_problems(inspection: CheckpointInspection) -> None:
    for engine in ("vllm", "sglang", "transformers"):
        problems = inspection.problems.get(engine)
        if problems is None:
            typer.echo(f"Not checked for {engine}, which does not know the model here.")
        elif not problems and engine == "sglang":
            continue  # names of fused layers alone are checked
        elif not problems:
            typer.echo(f"Checked for {engine}: no problem with names, shapes and schemes.")
        for problem in problems or ():
            typer.echo(f"{'Problem' if problem.fatal else 'Note'}: {problem}")
