"""Which kernel runs which scheme on which hardware, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import typer

from autoround_modifier.cli.tables import print_table
from autoround_modifier.engines.answers import EngineSupport
from autoround_modifier.engines.hardware import Hardware, in_words

__all__ = ["hardware_of", "kernels_as_json", "print_kernels"]

KNOWN = (
    "run: a checkpoint was run; reload: it gave the logits of the model in memory; asked: the "
    "engine's code was asked without the hardware; read: in its source"
)


def print_kernels(supports: Iterable[EngineSupport], refused: bool = True) -> None:
    """:param refused: whether to tell where an engine has none, and why"""
    print_table(
        ("engine", "scheme", "kernel", "hardware", "known"),
        [row for support in supports for row in _rows(support, refused)],
    )
    typer.echo(KNOWN)


def kernels_as_json(support: EngineSupport) -> list[dict[str, Any]]:
    """:return: hardware, and the kernel of each scheme on it"""
    return [
        {
            "hardware": str(hardware),
            "loads": support.loads_on(hardware),
            "kernels": [asdict(choice) for choice in choices],
        }
        for hardware, choices in support.kernels.items()
    ]


def _rows(support: EngineSupport, refused: bool) -> list[tuple[str, str, str, str, str]]:
    """:return: one row for each scheme and kernel, with the hardware that has it"""
    grouped: dict[tuple[str, str, str], list[Hardware]] = {}
    for hardware, choices in support.kernels.items():
        for choice in choices:
            if choice.kernel is None and not refused:
                continue
            key = (choice.layers_text, choice.kernel_text, choice.known)
            grouped.setdefault(key, []).append(hardware)
    name = f"{support.engine} {support.version}"
    return [
        (name, scheme, cell, in_words(hardware), known)
        for (scheme, cell, known), hardware in sorted(grouped.items(), key=lambda x: x[0][0])
    ]


def hardware_of(support: EngineSupport) -> str:
    """:return: where an engine loads a checkpoint, in words"""
    loading = [hardware for hardware in support.kernels if support.loads_on(hardware)]
    if len(loading) == len(support.kernels):
        return "any"
    by_options: dict[tuple[str, ...], list[Hardware]] = {}
    for hardware in loading:
        options = {choice.option for choice in support.kernels[hardware] if choice.option}
        by_options.setdefault(tuple(sorted(options)), []).append(hardware)
    named = [
        " ".join([in_words(found), *(f"({option})" for option in options)])
        for options, found in sorted(by_options.items(), key=lambda x: len(x[0]))
    ]
    return ", ".join(named) or "no"
