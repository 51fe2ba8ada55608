"""Search of each group's clipping range, weighted by the importance of the input channels."""

from __future__ import annotations

import torch
from torch import Tensor

from autoround_modifier.device import Compute
from autoround_modifier.formats import FloatGrid, FormatSpec, IntegerGrid, SuperBlockGrid
from autoround_modifier.search.float_search import search_float_range
from autoround_modifier.search.integer_search import search_integer_range
from autoround_modifier.search.super_block_search import search_super_block_range

__all__ = ["search_range"]


@torch.no_grad()
def search_range(
    weight: Tensor,
    spec: FormatSpec,
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
    compute: Compute | None = None,
) -> tuple[Tensor, Tensor] | None:
    """
    :param weight: (out_features, in_features), full precision
    :param spec: what it is quantized to
    :param importance: (in_features,), h >= 0; None or all zeros weighs all channels alike
    :param global_scale: (1,), float32, where the format has one
    :param compute: runs the evaluations
    :return: w_min and w_max of each group, float32: the range with the least error
        ``sum h * (s q - w)^2``; None for a format that has no search
    """
    if importance is None or not importance.any():
        importance = weight.new_ones(weight.shape[-1])
    # Scaled to mean 1; the small constant keeps groups of unused channels from being all ties.
    importance = importance.float() / importance.float().mean() + 1e-6
    grid, grouping = spec.grid(weight.dtype), spec.grouping(tuple(weight.shape))
    if isinstance(grid, FloatGrid):
        return search_float_range(weight, grouping, grid, importance, global_scale)
    if isinstance(grid, IntegerGrid):
        return search_integer_range(
            weight, grouping.group_size, grid, importance, compute or Compute()
        )
    if isinstance(grid, SuperBlockGrid):
        return search_super_block_range(weight, grouping, grid, importance)
    return None
