"""Which modules the targets of a recipe mean."""

from __future__ import annotations

from collections.abc import Iterable

from compressed_tensors.utils import is_match, match_named_modules
from compressed_tensors.utils.match import match_targets
from llmcompressor.observers import helpers
from torch import nn

from autoround_modifier.engines.fused import FUSED_NAMES

__all__ = [
    "FUSED_LAYER_NAMES",
    "fused_layers",
    "is_match",
    "match_named_modules",
    "match_targets",
]

# Layers of one module that engines fuse: what LLM-Compressor lists, and vLLM. The longest first,
# of which others are a part.
FUSED_LAYER_NAMES = sorted(
    dict.fromkeys(map(tuple, (*helpers.FUSED_LAYER_NAMES, *FUSED_NAMES.values()))),
    key=len,
    reverse=True,
)


def fused_layers(model: nn.Module, layers: Iterable[nn.Linear]) -> list[list[nn.Linear]]:
    """
    :param layers: of the model
    :return: the same layers; those that engines fuse (q/k/v, gate/up) are in one list, every other
        one is in a list of its own
    """
    left = dict.fromkeys(layers)
    groups: list[list[nn.Linear]] = []
    if not left:
        return groups
    for parent in model.modules():
        for names in FUSED_LAYER_NAMES:
            group = [x for name in names if (x := getattr(parent, name, None)) in left]
            if group:
                groups.append(group)
            for layer in group:
                del left[layer]
    return groups + [[layer] for layer in left]
