"""Under which names Transformers saves layers, and how experts get those of the release."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from autoround_modifier.host.experts import LinearExperts2D

__all__ = ["name_experts_as_released", "saved_name"]


def name_experts_as_released(model: nn.Module) -> None:
    """
    Let experts that LLM-Compressor has split be saved under the names of the release, such as
    ``experts.0.w1`` of Mixtral: Transformers fuses the experts that it finds under these, and vLLM
    reads these. LLM-Compressor 0.14 saves all as ``gate_proj``, ``up_proj`` and ``down_proj``. The
    names are those that the model's own conversion takes when it loads experts one by one.

    :param model: its conversions are extended; nothing happens where the names are the same
    """
    if not isinstance(model, PreTrainedModel):
        return
    if not any(isinstance(module, LinearExperts2D) for module in model.modules()):
        return
    conversions = _conversions(model)
    known = {pattern for x in conversions for pattern in x._original_source_patterns}
    added = [
        WeightRenaming(rf"\.experts\.(\d+)\.{released}\.", rf".experts.\1.{linear}.")
        for linear, released in _released_names(model)
        if linear != released
    ]
    added = [x for x in added if x._original_source_patterns[0] not in known]
    if added:
        cast(Any, model)._weight_conversions = [*conversions, *added]


def saved_name(model: nn.Module) -> Callable[[str], str]:
    """
    :return: gives the name in the files of a parameter of the model; what Transformers does to it
        with `revert_weight_conversion`
    """
    if not isinstance(model, PreTrainedModel):
        return lambda name: name
    reverse = [x.reverse_transform() for x in _conversions(model)[::-1]]
    renamings = [x for x in reverse if isinstance(x, WeightRenaming)]
    converters = [x for x in reverse if isinstance(x, WeightConverter)]

    @functools.cache
    def renamed(name: str) -> str:
        return rename_source_key(name, renamings, converters, reverse=True)[0]

    return renamed


def _conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """:return: what saving the model reverts"""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [x for x in found if not isinstance(x, PrefixChange)]
    return list(conversions)


def _released_names(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Yield (name that LLM-Compressor gives a layer of an expert, name in the release)."""
    linear = {
        "gate_up_proj": ("gate_proj", "up_proj"),
        "up_proj": ("up_proj",),
        "down_proj": ("down_proj",),
    }
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        if not isinstance(conversion, WeightConverter):
            continue
        before, _, fused = conversion._original_target_patterns[0].rpartition(".")
        sources = [x.split(".") for x in conversion._original_source_patterns]
        if not before.endswith("experts") or fused not in linear:
            continue
        if len(sources) == len(linear[fused]) and all(x[-1] == "weight" for x in sources):
            yield from zip(linear[fused], (x[-2] for x in sources), strict=True)
