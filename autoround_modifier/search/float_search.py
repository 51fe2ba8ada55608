"""
Search of the clipping range of each group of floating-point numbers.

SignRoundV2 (https://arxiv.org/abs/2512.04746) tries exponents one off for MXFP4 and scales of half
to one and a half times the observed one for NVFP4. Here both, and FP8, try factors of the observed
range; with scales that are powers of two only powers of two make a difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoround_modifier.device import slice_elements
from autoround_modifier.formats import FloatGrid, Grouping, MicroscalingGrid
from autoround_modifier.formats.grouping import observed_range

__all__ = ["search_float_range"]

# 1 first: where nothing is better, the observed range stays.
POWERS = (1.0, 0.5, 2.0)
FACTORS = (1.0, *(0.5 + 0.05 * step for step in range(21) if step != 10))


def search_float_range(
    weight: Tensor,
    grouping: Grouping,
    grid: FloatGrid,
    importance: Tensor,
    global_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """
    :param weight: (out_features, in_features), full precision
    :param grouping: which weights share a scale
    :param grid: the values the weight can take
    :param importance: (in_features,), h > 0, float32
    :param global_scale: (1,), float32, where the format has one
    :return: w_min and w_max, each (groups,), float32: the best range of each group
    """
    groups = grouping.split(weight.detach())
    weights = grouping.split(importance.expand(weight.shape))
    rows = max(1, slice_elements(weight.device) // grouping.group_size)
    found = [
        _search(grid, part, h, global_scale)
        for part, h in zip(groups.split(rows), weights.split(rows), strict=True)
    ]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def _search(
    grid: FloatGrid, weight: Tensor, importance: Tensor, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tensors are (groups, group_size)."""
    w_min, w_max = observed_range(weight)
    global_scale = None if global_scale is None else global_scale.expand(len(weight))
    best = torch.ones_like(w_min)
    best_error = torch.full_like(w_min, torch.inf)
    for factor in POWERS if isinstance(grid, MicroscalingGrid) else FACTORS:
        dequantized, _ = grid.fake_quantize(weight, w_min * factor, w_max * factor, global_scale)
        error = (importance * (dequantized - weight.float()).square()).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, factor, best)
    return w_min * best, w_max * best
