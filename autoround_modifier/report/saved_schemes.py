"""What `config.json` of a compressed-tensors checkpoint says of its schemes, in words and tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoround_modifier.config_sections import check_config
from autoround_modifier.errors import CheckpointError

__all__ = ["SavedScheme", "read_config", "saved_schemes"]

TARGETS = 3


@dataclass(frozen=True)
class SavedScheme:
    """
    One config group.

    :param targets: layers that it applies to, in words
    :param weights: in words
    :param activations: in words
    :param tag: of a model card, such as ``INT4`` or ``NVFP4``
    :param activation_tag: the same of activations, or None where they stay in 16 bits
    """

    targets: str
    weights: str
    activations: str
    tag: str
    activation_tag: str | None


def read_config(checkpoint: Path) -> dict[str, Any]:
    """
    :param checkpoint: folder
    :return: content of its ``config.json``
    :raises CheckpointError: if it has none, or one that cannot be read
    """
    path = checkpoint / "config.json"
    try:
        return check_config(json.loads(path.read_text(encoding="utf-8")), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there; name the folder of a checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error


def saved_schemes(config: Mapping[str, Any]) -> list[SavedScheme]:
    """
    :param config: content of ``config.json``
    :return: one for each config group with quantized weights; empty if it is no compressed-tensors
        checkpoint
    """
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "compressed-tensors":
        return []
    found = []
    for group in (quantization.get("config_groups") or {}).values():
        weights, inputs = group.get("weights"), group.get("input_activations")
        if weights is None:
            continue
        form = str(group.get("format") or quantization.get("format") or "")
        tag = _tag(weights, form)
        found.append(
            SavedScheme(
                targets=_targets_text(group.get("targets") or []),
                weights=_weights_text(weights, tag),
                activations="16 bits" if inputs is None else _activations_text(inputs, form),
                tag=tag,
                activation_tag=None if inputs is None else _tag(inputs, form),
            )
        )
    return found


def _tag(numbers: Mapping[str, Any], form: str) -> str:
    """:param form: of the file, such as ``pack-quantized`` or ``mxfp4-pack-quantized``"""
    bits = numbers["num_bits"]
    if numbers.get("type") == "int":
        return f"INT{bits}"
    if form.startswith("mxfp"):
        return f"MXFP{bits}"
    return f"NVFP{bits}" if form.startswith("nvfp") and bits == 4 else f"FP{bits}"


def _weights_text(weights: Mapping[str, Any], tag: str) -> str:
    text = tag
    if weights.get("type") == "int":
        text += ", symmetric" if weights.get("symmetric") else ", asymmetric"
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if strategy == "block" and weights.get("block_structure"):
        return f"{text}, blocks of {' x '.join(map(str, weights['block_structure']))}"
    if strategy in ("group", "tensor_group"):
        return f"{text}, groups of {group}"
    return f"{text}, one scale for each {strategy}" if strategy else text


def _activations_text(inputs: Mapping[str, Any], form: str) -> str:
    kinds = {False: "static", True: "dynamic", "local": "dynamic, with a static global scale"}
    return f"{_tag(inputs, form)}, {kinds.get(inputs.get('dynamic', False), 'dynamic')}"


def _targets_text(targets: list[str]) -> str:
    if len(targets) > TARGETS:
        return f"{len(targets)} layers or patterns"
    return ", ".join(f"`{target}`" for target in targets)
