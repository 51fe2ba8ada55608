"""`compare`: two checkpoints side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoround_modifier.cli.options import AsJson
from autoround_modifier.cli.shown_evaluation import percent
from autoround_modifier.cli.tables import print_json, print_table
from autoround_modifier.readable import bytes_text, duration_text

if TYPE_CHECKING:
    from autoround_modifier.report.comparison import Comparison, Side

__all__ = ["compare"]


def compare(
    first: Annotated[
        Path,
        typer.Argument(metavar="A", help="folder of a checkpoint, or its quantization_report.json"),
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="the other one")],
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints by their reports and evaluations; no model is loaded."""
    from autoround_modifier.report.comparison import compare_checkpoints

    found = compare_checkpoints(first, second)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _show(found)


def _show(found: Comparison) -> None:
    for letter, side in zip("AB", found.sides, strict=True):
        typer.echo(f"{letter}  {side.name}")
    rows = [(name, *values) for name, values in _rows(found.sides) if any(values)]
    rows += [
        (
            f"{task.task}, {task.metric}" + (f" ({task.filter})" if task.filter else ""),
            *(
                "" if value is None else f"{value:.4f}" + (f" ({percent(part)})" if part else "")
                for value, part in zip(task.values, task.recovery, strict=True)
            ),
        )
        for task in found.tasks
    ]
    print_table(("", "A", "B"), rows)
    if all(side.divergence for side in found.sides) and not found.same_text:
        typer.echo("The divergences are of different samples and cannot be compared.")
    if found.kinds:
        columns = [f"{what} {letter}" for letter in "AB" for what in ("scheme", "bits", "error")]
        differences = []
        for kind in found.kinds:
            cells = [kind.kind]
            for schemes, bits, error in zip(kind.schemes, kind.bits, kind.error, strict=True):
                cells += [_counted(dict(schemes)), _number(bits, ".3f"), _number(error, ".4g")]
            differences.append(cells)
        print_table(("layers", *columns), differences, title="Where the schemes differ")


def _rows(sides: list[Side]) -> list[tuple[str, list[str]]]:
    found = [side.divergence for side in sides]
    return [
        ("made from", [side.model or "" for side in sides]),
        ("recipe", [side.recipe or "" for side in sides]),
        ("layers by scheme", [_counted(side.schemes) for side in sides]),
        ("bits per quantized weight", [_number(side.quantized_bits, ".3f") for side in sides]),
        ("size", [_size(side.saved_bytes) for side in sides]),
        ("size of the original", [_size(side.original_bytes) for side in sides]),
        ("time", [_time(side.seconds) for side in sides]),
        ("evaluated on", [side.text.source if side.text else "" for side in sides]),
        ("KL divergence, nats per token", [f"{x.kl:.5f}" if x else "" for x in found]),
        ("same first choice", [percent(x.top1) if x else "" for x in found]),
        ("perplexity", [f"{x.perplexity:.4f}" if x else "" for x in found]),
    ]


def _counted(schemes: dict[str, int | None]) -> str:
    return "\n".join(f"{name}: {n}" if n is not None else name for name, n in schemes.items())


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _size(size: int | None) -> str:
    return "" if size is None else bytes_text(size)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration_text(seconds)
