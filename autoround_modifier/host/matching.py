"""Which modules the targets of a recipe mean."""

from __future__ import annotations

from collections.abc import Iterable

from compressed_tensors.utils import is_match, match_named_modules
from compressed_tensors.utils.match import match_targets
from llmcompressor.observers import helpers
from torch import nn

from autoround_modifier.engines.fused import FUSED_NAMES
from autoround_modifier.host.lifecycle import infer_sequential_targets

__all__ = [
    "FUSED_LAYER_NAMES",
    "find_blocks",
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


def find_blocks(model: nn.Module, sequential_targets: list[str] | None) -> dict[nn.Module, str]:
    """
    :param sequential_targets: class names or name patterns of the blocks; None for those that the
        model itself declares (``_no_split_modules``)
    :return: the decoder blocks and their names, in the order of the model
    """
    targets = infer_sequential_targets(model, sequential_targets)
    return {block: name for name, block in match_named_modules(model, targets)}


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
