"""What was done in one sentence, and the figures at the top of a page or a card."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from autoround_modifier.readable import (
    bits_text,
    bytes_text,
    count_text,
    duration_text,
    figures_text,
    percent_text,
)
from autoround_modifier.report.rounding_method import rounding_method
from autoround_modifier.report.schema import DataRecord, Evaluation, LayerRecord, QuantizationReport
from autoround_modifier.report.words import model_name, scheme_text

__all__ = ["KeyFigure", "command_text", "key_figures", "mean_bits", "schemes_text", "summary"]


@dataclass(frozen=True)
class KeyFigure:
    """
    :param note: what it is compared with, or how it is counted
    """

    name: str
    value: str
    note: str = ""


def summary(report: QuantizationReport, evaluation: Evaluation | None) -> str:
    """:return: what was done and what came of it, one sentence"""
    name = model_name(report.model.source)
    text = f"{name} was quantized"
    if report.layers:
        text += f" to {bits_text(mean_bits(report))} bits per weight"
        text += f" ({schemes_text(report.layers)})"
    method = rounding_method(report.recipe)
    text += f" by {method.text}"
    if report.data is not None:
        text += f" on {_data_text(report.data, method.samples)}"
    if report.auto_scheme is not None:
        text += ", with schemes chosen by AutoScheme"
    if report.distillation is not None and report.distillation.kept:
        text += ", and its scales were then trained end to end"
    if report.size is not None:
        saved, original = report.size.saved_bytes, report.size.original_bytes
        text += f"; the checkpoint has {bytes_text(saved)} instead of {bytes_text(original)}"
    if evaluation is not None and evaluation.divergence is not None:
        found = evaluation.divergence
        text += f" (KL divergence {found.kl:.3f}, same top token {percent_text(found.top1)})"
    return text + "."


def command_text(report: QuantizationReport) -> str | None:
    """:return: the command line, with the name of its program alone; None where there was none"""
    if not report.command:
        return None
    program, *arguments = report.command
    return shlex.join([Path(program).name, *arguments])


def _data_text(data: DataRecord, tuned_on: int | None) -> str:
    """:param tuned_on: largest number of samples that were tuned on; None for all"""
    number = data.samples if tuned_on is None else min(tuned_on, data.samples)
    length = f"{data.max_length} tokens"
    if data.tokens < data.samples * data.max_length:
        length = f"up to {length}"
    samples = "1 sample" if number == 1 else f"{number} samples"
    return f"{samples} of {length}"


def schemes_text(layers: list[LayerRecord]) -> str:
    """:return: schemes in words, that of most weights first; of many, how many"""
    weights: Counter[str] = Counter()
    for layer in layers:
        weights[layer.scheme] += layer.weights
    names = [name for name, _ in weights.most_common()]
    if len(names) > 3:
        return f"{len(names)} schemes"
    heads, _, tails = zip(*(name.partition(" ") for name in names), strict=True)
    integers = all(re.match(r"W\d+A", head) for head in heads)
    if integers and len(set(tails)) == 1 and len(names) > 1:
        others = f"{', '.join(heads[:-1])} and "
        return others + scheme_text(f"{heads[-1]} {tails[0]}".strip())
    return "; ".join(map(scheme_text, names))


def mean_bits(report: QuantizationReport) -> float:
    """:return: bits of a quantized weight, as saved; 0 if nothing is quantized"""
    if report.size is not None:
        return report.size.quantized_bits
    weights = sum(layer.weights for layer in report.layers)
    return sum(x.bits_per_weight * x.weights for x in report.layers) / max(weights, 1)


def key_figures(report: QuantizationReport, evaluation: Evaluation | None) -> list[KeyFigure]:
    """:return: those for which there is data"""
    figures = []
    if report.layers:
        weights = sum(layer.weights for layer in report.layers)
        note = f"of {count_text(weights)} quantized weights"
        figures.append(KeyFigure("Bits per weight", bits_text(mean_bits(report)), note))
    if report.size is not None:
        saved, original = report.size.saved_bytes, report.size.original_bytes
        note = f"instead of {bytes_text(original)}"
        if original > saved:
            note += f", {percent_text(1 - saved / original, 0)} less"
        figures.append(KeyFigure("Checkpoint", bytes_text(saved), note))
    if evaluation is not None and evaluation.divergence is not None:
        found = evaluation.divergence
        figures += [
            KeyFigure("KL divergence", f"{found.kl:.3f}", "nats per token, from the original"),
            KeyFigure("Same top token", percent_text(found.top1), "of the tokens"),
            KeyFigure(
                "Perplexity",
                figures_text(found.perplexity, 4),
                f"original {figures_text(found.original_perplexity, 4)}",
            ),
        ]
    figures.append(KeyFigure("Time", duration_text(report.seconds), f"on {report.device}"))
    host = max((phase.peak_host_bytes for phase in report.phases), default=0)
    device = max((phase.peak_device_bytes for phase in report.phases), default=0)
    if device:
        figures.append(KeyFigure("Peak device memory", bytes_text(device), "allocated"))
    if host:
        figures.append(KeyFigure("Peak host memory", bytes_text(host), "resident"))
    return figures
