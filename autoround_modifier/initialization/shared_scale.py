"""
One scale for several layers that engines multiply by as one: q, k and v, or gate and up.

NVFP4 has one scale of the whole tensor above those of its groups, and FP8 by tensor has no other.
Where fused layers bring different ones, vLLM takes one of them for all: FP8 weights are rounded a
second time, and NVFP4's scales of groups stand under a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import generate_gparam
from llmcompressor.observers.helpers import FUSED_LAYER_NAMES
from torch import Tensor, nn

from autoround_modifier.formats.grouping import observed_range
from autoround_modifier.initialization.search import search_range

__all__ = ["fused_layers", "shared_global_scale", "shared_range"]


def fused_layers(model: nn.Module, layers: Iterable[nn.Linear]) -> list[list[nn.Linear]]:
    """
    :param layers: of the model
    :return: the same layers; those that engines fuse stand together, every other one by itself
    """
    left = dict.fromkeys(layers)
    groups = []
    for parent in model.modules():
        for names in FUSED_LAYER_NAMES:
            group = [x for name in names if (x := getattr(parent, name, None)) in left]
            if group:
                groups.append(group)
            for layer in group:
                del left[layer]
    return groups + [[layer] for layer in left]


@torch.no_grad()
def shared_global_scale(layers: Sequence[nn.Linear]) -> Tensor:
    """
    ``448 * 6 / max(abs(W))``, so that the scale of the group with the largest weight is E4M3's
    largest number.

    :return: (1,), float32
    """
    largest = torch.stack([layer.weight.abs().max().float() for layer in layers]).max()
    return generate_gparam(-largest, largest)


@torch.no_grad()
def shared_range(
    layers: Sequence[nn.Linear], args: QuantizationArgs, importance: Tensor | None, search: bool
) -> tuple[Tensor, Tensor]:
    """
    :param layers: see the same inputs
    :param args: floating-point weight arguments, strategy ``tensor``
    :param importance: (in_features,), see `search_range`
    :param search: false for the observed range
    :return: w_min and w_max, each (1,), float32
    """
    weight = torch.cat([layer.weight for layer in layers])
    if search:
        return search_range(weight, args, importance)
    return observed_range(weight.view(1, -1))
