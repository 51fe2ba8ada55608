"""An evaluation as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from autoround_modifier.readable import percent_text

if TYPE_CHECKING:
    from autoround_modifier.report.schema import Evaluation, TaskResult

__all__ = ["percent", "show_evaluation", "shown_tasks"]


def show_evaluation(evaluation: Evaluation) -> None:
    """Print divergence, tasks and generations, each if it is there."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    typer.echo(f"original   {evaluation.original}\nquantized  {evaluation.quantized}")
    if evaluation.divergence is not None and evaluation.text is not None:
        text, found = evaluation.text, evaluation.divergence
        typer.echo()
        table = Table(
            title=f"{text.source}: {text.samples} samples of {text.length} tokens",
            title_justify="left",
        )
        for column in ("", "original", "quantized"):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row("KL divergence, nats per token", "", f"{found.kl:.5f}")
        table.add_row("same first choice", "", percent(found.top1))
        table.add_row("perplexity", f"{found.original_perplexity:.4f}", f"{found.perplexity:.4f}")
        console.print(table)
    if evaluation.tasks:
        typer.echo()
        table = Table(title="lm-evaluation-harness", title_justify="left")
        for column in ("task", "metric", "shots", "original", "quantized", "recovery"):
            table.add_column(column, justify="left" if column in ("task", "metric") else "right")
        for result in shown_tasks(evaluation.tasks):
            table.add_row(
                result.task,
                result.metric + (f" ({result.filter})" if result.filter else ""),
                "" if result.shots is None else str(result.shots),
                _value(result.original, result.original_stderr),
                _value(result.quantized, result.quantized_stderr),
                percent(result.recovery),
            )
        console.print(table)
        hidden = len(evaluation.tasks) - len(shown_tasks(evaluation.tasks))
        if hidden:
            typer.echo(f"{hidden} results of parts of groups are in the file alone")
    for generation in evaluation.generations:
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
