"""
Search of the clipping range of each group of integers.

SignRoundV2 (https://arxiv.org/abs/2512.04746) minimises ``sum h * (s q - w)^2`` per group over a
few hundred candidate scales, where ``h_j = sum of x_j^2`` over the calibration tokens. Here a
coarse grid is followed by alternating least squares: for fixed integers the best scale (and, if
asymmetric, the best offset) has a closed form, and for a fixed scale rounding is the best choice
of integers. That finds lower errors with a quarter of the evaluations, and serves symmetric and
asymmetric integers alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from autoround_modifier.formats import Grouping, IntegerGrid
from autoround_modifier.formats.fusion import SLICE_ELEMENTS, fuse
from autoround_modifier.formats.grouping import observed_range
from autoround_modifier.formats.integer import integer_range

__all__ = ["search_integer_range"]

SYMMETRIC_CANDIDATES = 12
ASYMMETRIC_SHRINK = (1.0, 0.8, 0.6, 0.4)
LEAST_SQUARES_STEPS = 6


def search_integer_range(
    weight: Tensor, args: QuantizationArgs, importance: Tensor, fused: bool
) -> tuple[Tensor, Tensor]:
    """
    :param weight: (out_features, in_features), full precision
    :param args: integer weight arguments, strategy ``group`` or ``channel``
    :param importance: (in_features,), h > 0, float32
    :param fused: compute with `torch.compile`; the values are the same, sooner
    :return: w_min and w_max, each (out_features, groups), float32: the best range of each group
    """
    # Row by row nothing depends on the other rows.
    rows = weight.shape[0] if fused else max(1, SLICE_ELEMENTS // weight.shape[-1])
    found = [_GroupSearch(part, args, importance, fused).run() for part in weight.split(rows)]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


class _GroupSearch:
    """The search over some rows of a weight; tensors are (rows, groups[, group_size])."""

    def __init__(self, weight: Tensor, args: QuantizationArgs, importance: Tensor, fused: bool):
        self.grid = IntegerGrid.of(args, weight.dtype)
        group_size = Grouping.of(weight.shape, args).group_size
        self.weight = weight.detach().unflatten(-1, (-1, group_size))
        self.importance = importance.unflatten(-1, (-1, group_size))
        self.error = _fused_weighted_error if fused else _weighted_error
        self.least_squares = _fused_least_squares if fused else _least_squares
        self.w_min, self.w_max = observed_range(self.weight)
        self.best = (self.w_min, self.w_max)
        self.best_error = torch.full_like(self.w_min, torch.inf)

    def run(self) -> tuple[Tensor, Tensor]:
        candidates = self._symmetric_grid if self.grid.symmetric else self._asymmetric_grid
        for low, high in candidates():
            self._try(low, high)
        for _ in range(LEAST_SQUARES_STEPS):
            self._try(*self.least_squares(self.grid, self.weight, self.importance, *self.best))
        return self.best

    def _try(self, low: Tensor, high: Tensor) -> None:
        """Keep this range in the groups where its weighted squared error is the lowest so far."""
        error = self.error(self.grid, self.weight, self.importance, low, high)
        better = error < self.best_error
        self.best_error = torch.where(better, error, self.best_error)
        self.best = (
            torch.where(better, low, self.best[0]),
            torch.where(better, high, self.best[1]),
        )

    def _symmetric_grid(self) -> Iterator[tuple[Tensor, Tensor]]:
        """
        ``s = g / -(2^(b-1) - d)``: the weight of largest magnitude g falls below, on or beyond the
        last integer. Both signs of the scale are tried: the grid has one integer more on one side.
        """
        yield self.w_min, self.w_max
        levels = 2 ** (self.grid.num_bits - 1)
        spread = 0.9 if self.grid.num_bits == 2 else 0.75
        extreme = torch.where(self.w_max > -self.w_min, self.w_max, -self.w_min)
        zero = torch.zeros_like(extreme)
        for d in torch.linspace(-spread, spread, SYMMETRIC_CANDIDATES).tolist():
            reach = extreme * (levels / (levels - d))
            yield -reach, zero
            yield zero, reach

    def _asymmetric_grid(self) -> Iterator[tuple[Tensor, Tensor]]:
        for low in ASYMMETRIC_SHRINK:
            for high in ASYMMETRIC_SHRINK:
                yield self.w_min * low, self.w_max * high


def _weighted_error(
    grid: IntegerGrid, weight: Tensor, importance: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """:return: sum of h * (s (q - z) - w)^2 of each group, (rows, groups)"""
    steps, scale, _ = grid.quantize(weight, low, high)
    return _total(importance * (steps * scale - weight.float()).square()).float()


def _least_squares(
    grid: IntegerGrid, weight: Tensor, importance: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """:return: the range whose scale (and offset) fits the integers of this range best"""
    steps, _, zero_point = grid.quantize(weight, low, high)
    q_min, q_max = integer_range(grid.num_bits)
    h, w = importance, weight.float()
    if grid.symmetric:
        scale = _total(h * steps * w) / _total(h * steps * steps).clamp(min=1e-30)
        reach = scale.float() * -q_min
        # A range below zero stands for a positive scale, one above zero for a negative scale.
        return -reach.clamp(min=0), -reach.clamp(max=0)
    total = _total(h)
    mean_steps, mean_w = _total(h * steps) / total, _total(h * w) / total
    centred = steps - mean_steps.float().unsqueeze(-1)
    covariance = _total(h * centred * w)
    scale = covariance / _total(h * centred * centred).clamp(min=1e-30)
    offset = mean_w - scale * mean_steps  # w ~ scale * (q - z) + offset
    zero = zero_point.squeeze(-1)
    low_fit = offset + scale * (q_min - zero)
    high_fit = offset + scale * (q_max - zero)
    return low_fit.clamp(max=0).float(), high_fit.clamp(min=0).float()


def _total(terms: Tensor) -> Tensor:
    """
    :return: sum of each group, float64: rounded to float32 it does not show in which order terms
        were added, which compiled code chooses
    """
    return terms.sum(-1, dtype=torch.float64)


_fused_weighted_error = fuse(_weighted_error)
_fused_least_squares = fuse(_least_squares)
