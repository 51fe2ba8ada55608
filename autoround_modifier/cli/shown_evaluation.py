"""An evaluation as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from autoround_modifier.cli.tables import print_table
from autoround_modifier.readable import percent_text

if TYPE_CHECKING:
    from autoround_modifier.report.schema import Evaluation, Generation, TaskResult

__all__ = ["percent", "show_evaluation", "shown_tasks"]

NUMBERS = ("shots", "original", "quantized", "recovery")


def show_evaluation(evaluation: Evaluation) -> None:
    """Print divergence, tasks and generations, each if it is there."""
    typer.echo(f"original   {evaluation.original}\nquantized  {evaluation.quantized}")
    if evaluation.divergence is not None and evaluation.text is not None:
        text, found = evaluation.text, evaluation.divergence
        typer.echo()
        print_table(
            ("", "original", "quantized"),
            [
                ("KL divergence, nats per token", "", f"{found.kl:.5f}"),
                ("same first choice", "", percent(found.top1)),
                ("perplexity", f"{found.original_perplexity:.4f}", f"{found.perplexity:.4f}"),
            ],
            NUMBERS,
            f"{text.source}: {text.samples} samples of {text.length} tokens",
        )
    if evaluation.tasks:
        typer.echo()
        shown = shown_tasks(evaluation.tasks)
        rows = [
            (
                result.task,
                result.metric + (f" ({result.filter})" if result.filter else ""),
                "" if result.shots is None else str(result.shots),
                _value(result.original, result.original_stderr),
                _value(result.quantized, result.quantized_stderr),
                percent(result.recovery),
            )
            for result in shown
        ]
        columns = ("task", "metric", "shots", "original", "quantized", "recovery")
        print_table(columns, rows, NUMBERS, "lm-evaluation-harness")
        hidden = len(evaluation.tasks) - len(shown)
        if hidden:
            typer.echo(f"{hidden} results of parts of groups are in the file alone")
    if evaluation.generations:
        _show_generations(evaluation.generations)


def _show_generations(generations: list[Generation]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for generation in generations:
        typer.echo()
        table = Table(
            title=Text(generation.prompt), title_justify="left", show_lines=True, expand=True
        )
        table.add_column("original", ratio=1)
        table.add_column("quantized", ratio=1)
        table.add_row(Text(generation.original), Text(generation.quantized))
        console.print(table)


def shown_tasks(tasks: list[TaskResult]) -> list[TaskResult]:
    """:return: without those over which a group that is shown is a mean"""
    return [result for result in tasks if result.group is None]


def percent(share: float | None) -> str:
    return "" if share is None else percent_text(share, 2)


def _value(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
