"""Search of each group's clipping range, weighted by the importance of the input channels."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from autoround_modifier.formats import FloatGrid, grid_of
from autoround_modifier.initialization.float_search import search_float_range
from autoround_modifier.initialization.integer_search import search_integer_range

__all__ = ["search_range"]


@torch.no_grad()
def search_range(
    weight: Tensor,
    args: QuantizationArgs,
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    :param weight: (out_features, in_features), full precision
    :param args: how the weight is quantized
    :param importance: (in_features,), h >= 0; None or all zeros weighs all channels alike
    :param global_scale: (1,), float32, where the format has one
    :param fused: compute with `torch.compile` where it pays; the values are the same
    :return: w_min and w_max of each group, float32: the range with the least error
        ``sum h * (s q - w)^2``
    """
    if importance is None or not importance.any():
        importance = weight.new_ones(weight.shape[-1])
    # Scaled to mean 1; the small constant keeps groups of unused channels from being all ties.
    importance = importance.float() / importance.float().mean() + 1e-6
    grid = grid_of(args, weight.dtype)
    if isinstance(grid, FloatGrid):
        return search_float_range(weight, args, grid, importance, global_scale)
    return search_integer_range(weight, args, importance, fused)
