"""Schemes, results and models as they stand in a sentence and in a table."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from autoround_modifier.readable import figures_text

__all__ = [
    "hub_name",
    "model_name",
    "result_text",
    "scheme_text",
]

# The folder of a model in the cache of huggingface_hub
_CACHED = re.compile(r"(?:^|/)models--([^/]+)--([^/]+?)(?:/|$)")


def result_text(value: float) -> str:
    """:return: the result of a task: a share with four decimals, anything else with four figures"""
    return f"{value:.4f}" if abs(value) <= 1 else figures_text(value, 4)


def scheme_text(scheme: str) -> str:
    """
    :param scheme: `engines.scheme.Scheme.label`, such as ``W2A16 G64`` or ``FP8 tensor static``
    :return: in words, such as ``W2A16 symmetric, groups of 64``; names of other kinds as they are
    """
    name, *details = scheme.split(" ")
    signs = ["symmetric"] if re.match(r"W\d+A", name) else []
    parts = []
    for detail in details:
        if detail == "asym":
            signs = ["asymmetric"]
        elif re.fullmatch(r"G\d+", detail):
            parts.append(f"groups of {detail[1:]}")
        elif re.fullmatch(r"\d+x\d+", detail):
            parts.append(f"blocks of {detail.replace('x', ' x ')}")
        elif detail in ("channel", "tensor"):
            parts.append(f"one scale for each {detail}")
        elif detail in ("dynamic", "static"):
            parts.append(f"{detail} activations")
        elif detail != "block":
            return scheme
    return ", ".join([" ".join([name, *signs]), *parts])


def hub_name(source: str) -> str | None:
    """
    :param source: folder or name that a model was loaded from
    :return: ``owner/name`` of a folder of the hub's cache, else None
    """
    cached = _CACHED.search(source)
    return f"{cached[1]}/{cached[2]}" if cached else None


def model_name(source: str) -> str:
    """
    :param source: folder or name that a model was loaded from
    :return: its last part, without the owner; of a folder of the hub's cache, the model's name
    """
    cached = _CACHED.search(source)
    return cached[2] if cached else PurePosixPath(source.replace("\\", "/")).name or source
