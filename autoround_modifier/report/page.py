"""One HTML page of a run: self-contained, without scripts, readable on a phone and in print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from autoround_modifier.errors import MissingExtraError
from autoround_modifier.readable import (
    bits_text,
    duration_text,
    percent_text,
    unbroken,
)
from autoround_modifier.report.layer_table import (
    bits_by_block,
    by_kind,
    bytes_by_kind,
    expert_tokens,
    grid_of,
    unquantized_bytes,
)
from autoround_modifier.report.own_files import check_own, write_own
from autoround_modifier.report.plots import Drawn, Plots
from autoround_modifier.report.results_table import recovery_text
from autoround_modifier.report.schema import (
    Evaluation,
    QuantizationReport,
    TokenDivergence,
    check_folder,
    read_evaluation,
    read_report,
)
from autoround_modifier.report.summary import command_text, key_figures, summary
from autoround_modifier.report.templates import template
from autoround_modifier.report.words import model_name, result_text, scheme_text

__all__ = ["PAGE_FILE", "check_matplotlib", "render_page", "write_page"]

PAGE_FILE = "quantization_report.html"
MARK = '<meta name="generator" content="autoround-modifier report">'

# Limits of the colours of tokens, in nats. At 0.1 the quantized model is nearly the original; at 2,
# it gives what the original prefers a seventh of the likelihood.
TOKEN_LIMITS = (0.1, 0.5, 1.0, 2.0, 4.0)
MOST_DIVERGENT = 10


@dataclass(frozen=True)
class Token:
    """
    :param level: number of the limits of `TOKEN_LIMITS` that its divergence reaches
    """

    text: str
    kl: float
    same_top1: bool
    level: int


def write_page(checkpoint: Path, output: Path | None = None, overwrite: bool = False) -> Path:
    """
    :param checkpoint: folder with a report
    :param output: file; None for ``quantization_report.html`` in the folder
    :param overwrite: write over a file that is no such page
    :return: the file
    :raises CheckpointError: if there is no report, or one that cannot be read
    :raises MissingExtraError: if matplotlib is not installed
    :raises OutputExistsError: if the file is there and is no such page
    """
    path = checkpoint / PAGE_FILE if output is None else output
    check_folder(checkpoint)
    report = read_report(checkpoint)
    evaluation = read_evaluation(checkpoint)
    check_own(path, MARK, overwrite)
    write_own(path, render_page(report, evaluation), MARK, overwrite)
    return path


def check_matplotlib() -> None:
    """:raises MissingExtraError: if matplotlib, which draws the figures, is not installed"""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("the page of a report", "matplotlib", "plot") from None


def render_page(report: QuantizationReport, evaluation: Evaluation | None) -> str:
    """
    :return: HTML; sections without data are left out
    :raises MissingExtraError: if matplotlib is not installed
    :raises CheckpointError: if the recipe in the report cannot be read
    """
    check_matplotlib()
    page = template(
        "page.html",
        autoescape=True,
        duration=duration_text,
        recovery=recovery_text,
        result=result_text,
        scheme=scheme_text,
        unbroken=unbroken,
    )
    tokens = [] if evaluation is None else _tokens(evaluation.tokens)
    return page.render(
        mark=Markup(MARK),
        name=model_name(report.model.source),
        summary=summary(report, evaluation),
        key_figures=key_figures(report, evaluation),
        report=report,
        evaluation=evaluation,
        kinds=by_kind(report.layers),
        experts=expert_tokens(report.layers),
        same_bits=_same_bits(report),
        figures={name: _safe(drawn) for name, drawn in _figures(report).items()},
        command=command_text(report),
        tokens=tokens,
        token_levels=_token_levels(tokens),
        most_divergent=sorted(tokens, key=lambda x: -x.kl)[:MOST_DIVERGENT],
    )


def _same_bits(report: QuantizationReport) -> float | None:
    """:return: bits for each weight of every block, where all have the same"""
    bits = set(map(bits_text, bits_by_block(report.layers).values()))
    return float(bits.pop()) if len(bits) == 1 else None


def _safe(drawn: Drawn) -> dict[str, Any]:
    """The only part of the page that is not escaped: an XML library wrote it."""
    return {"svg": Markup(drawn.svg), "caption": drawn.caption}


def _figures(report: QuantizationReport) -> dict[str, Drawn]:
    """:return: by name, those for which there is data"""
    plots, layers = Plots(), report.layers
    drawn: dict[str, Drawn] = {}
    if report.blocks:
        drawn["losses"] = plots.losses(report.blocks)
    unquantized = unquantized_bytes(report)
    if report.size is not None and unquantized is not None:
        drawn["size"] = plots.size(report.size, unquantized)
    if layers:
        drawn["bits_by_kind"] = plots.bits_by_kind(bytes_by_kind(layers), unquantized)
    depths = bits_by_block(layers)
    if len(set(map(bits_text, depths.values()))) > 1:
        drawn["bits_by_depth"] = plots.bits_by_depth(depths)
    in_blocks = [layer for layer in layers if layer.block is not None]
    for error_of in ("output", "weight"):
        measured = [x for x in in_blocks if x.error_of == error_of and x.error is not None]
        if measured:
            grid = grid_of(measured, lambda x: x.error)
            drawn[f"error_of_{error_of}"] = plots.heat_map(grid, f"Error of the {error_of}")
    if any(layer.moved for layer in in_blocks):
        grid = grid_of(in_blocks, lambda x: x.moved / max(x.weights, 1))
        drawn["moved"] = plots.heat_map(grid, "Share of values moved", percent_text)
    experts = expert_tokens(layers)
    if experts:
        drawn["experts"] = plots.expert_tokens(experts)
    if report.phases:
        drawn["seconds"] = plots.seconds(report.phases)
        if any(phase.peak_host_bytes for phase in report.phases):
            drawn["memory"] = plots.memory(report.phases)
    if report.auto_scheme is not None:
        drawn["frontier"] = plots.frontier(report.auto_scheme)
    if in_blocks and len({layer.scheme for layer in layers}) > 1:
        drawn["schemes"] = plots.schemes(in_blocks)
    return drawn


def _tokens(tokens: Sequence[TokenDivergence]) -> list[Token]:
    return [
        Token(x.text, x.kl, x.same_top1, sum(x.kl >= limit for limit in TOKEN_LIMITS))
        for x in tokens
    ]


def _token_levels(tokens: Sequence[Token]) -> list[tuple[str, int]]:
    """:return: for each level, its limits in words and the number of its tokens"""
    words = [
        f"below {TOKEN_LIMITS[0]:g}",
        *(f"{a:g} to {b:g}" for a, b in pairwise(TOKEN_LIMITS)),
        f"{TOKEN_LIMITS[-1]:g} or more",
    ]
    return [(text, sum(x.level == level for x in tokens)) for level, text in enumerate(words)]
