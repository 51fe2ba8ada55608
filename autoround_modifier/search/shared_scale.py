"""
One scale for several layers that engines multiply by as one: q, k and v, or gate and up.

NVFP4 has one scale of the whole tensor above those of its groups, and FP8 by tensor has no other.
Where fused layers have different ones, vLLM takes one of them for all: FP8 weights are rounded a
second time, and NVFP4's scales of groups are multiplied by a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoround_modifier.formats import FormatSpec
from autoround_modifier.formats.floating import E2M1, E4M3
from autoround_modifier.formats.grouping import observed_range
from autoround_modifier.search.clipping_range import search_range

__all__ = ["shared_global_scale", "shared_range"]


@torch.no_grad()
def shared_global_scale(weights: Sequence[Tensor]) -> Tensor:
    """
    ``448 * 6 / max(abs(W))``, so that the scale of the group with the largest weight is E4M3's
    largest number; 1 for weights of zeros.

    :param weights: of layers that are multiplied by as one
    :return: (1,), float32
    """
    largest = torch.stack([weight.abs().max().float() for weight in weights]).max()
    tiny = torch.finfo(torch.float32).tiny
    scale = E4M3.max_value * E2M1.max_value / largest.clamp(min=tiny)
    return scale.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).reshape(1)


@torch.no_grad()
def shared_range(
    weights: Sequence[Tensor], spec: FormatSpec, importance: Tensor | None, search: bool
) -> tuple[Tensor, Tensor]:
    """
    :param weights: of layers that receive the same inputs and are multiplied by as one
    :param spec: one scale for the whole tensor
    :param importance: (in_features,), see `search_range`
    :param search: false for the observed range
    :return: w_min and w_max, each (1,), float32
    """
    weight = torch.cat(list(weights))
    found = search_range(weight, spec, importance) if search else None
    if found is not None:
        return found
    return observed_range(weight.view(1, -1))
