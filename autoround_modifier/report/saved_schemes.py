"""The schemes that ``config.json`` of a compressed-tensors checkpoint has, for a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoround_modifier.checkpoints.saved_config import COMPRESSED_TENSORS, quantization_of
from autoround_modifier.engines.scheme import Scheme

__all__ = ["SavedScheme", "saved_schemes"]

TARGETS = 3


@dataclass(frozen=True)
class SavedScheme:
    """
    One config group.

    :param targets: layers that it applies to, in words
    """

    targets: str
    scheme: Scheme


def saved_schemes(config: Mapping[str, Any]) -> list[SavedScheme]:
    """
    :param config: content of ``config.json``
    :return: one for each config group with quantized weights; empty if it is no compressed-tensors
        checkpoint
    """
    quantization = quantization_of(config) or {}
    if quantization.get("quant_method") != COMPRESSED_TENSORS:
        return []
    found = []
    for group in (quantization.get("config_groups") or {}).values():
        scheme = Scheme.of_group(group, quantization.get("format"))
        if scheme is not None:
            found.append(SavedScheme(_targets_text(group.get("targets") or []), scheme))
    return found


def _targets_text(targets: list[str]) -> str:
    if len(targets) > TARGETS:
        return f"{len(targets)} layers or patterns"
    return ", ".join(f"`{target}`" for target in targets)
