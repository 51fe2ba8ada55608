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

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from autoround_modifier.device import Compute, slice_elements
from autoround_modifier.formats import IntegerGrid
from autoround_modifier.formats.grouping import observed_range
from autoround_modifier.formats.integer import integer_range

__all__ = ["search_integer_range"]

SYMMETRIC_CANDIDATES = 12
ASYMMETRIC_SHRINK = (1.0, 0.8, 0.6, 0.4)
LEAST_SQUARES_STEPS = 6


def search_integer_range(
    weight: Tensor, group_size: int, grid: IntegerGrid, importance: Tensor, compute: Compute
) -> tuple[Tensor, Tensor]:
    """
    :param weight: (out_features, in_features), full precision
    :param group_size: columns that share a scale; divides in_features
    :param grid: the integers
    :param importance: (in_features,), h > 0, float32
    :param compute: runs the evaluations
    :return: w_min and w_max, each (out_features, groups), float32: the best range of each group
    """
    # No row depends on another one. Without a compiler, each slice of rows is searched to the end
    # while it is in the processor's cache.
    rows = len(weight)
    if not compute.compiled:
        rows = max(1, slice_elements(weight.device) // weight.shape[-1])
    found = [
        _GroupSearch(part, group_size, grid, importance, compute).run()
        for part in weight.split(rows)
    ]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


class _GroupSearch:
    """The search over some rows of a weight; tensors are (rows, groups[, group_size])."""

    def __init__(
        self,
        weight: Tensor,
        group_size: int,
        grid: IntegerGrid,
        importance: Tensor,
        compute: Compute,
    ):
        self.grid = grid
        self.compute = compute
        self.weight = weight.detach().unflatten(-1, (-1, group_size))
        self.importance = importance.unflatten(-1, (-1, group_size))
        self.w_min, self.w_max = observed_range(self.weight)
        self.best = (self.w_min, self.w_max)
        self.best_error = torch.full_like(self.w_min, torch.inf)

    def run(self) -> tuple[Tensor, Tensor]:
        candidates = self._symmetric_grid if self.grid.symmetric else self._asymmetric_grid
        for low, high in candidates():
            self._try(low, high)
        for _ in range(LEAST_SQUARES_STEPS):
            fitted = self._over_rows(_least_squares, *self.best)
            self._try(*(torch.cat(ends) for ends in zip(*fitted, strict=True)))
        return self.best

    def _try(self, low: Tensor, high: Tensor) -> None:
        """Keep this range in the groups where its weighted squared error is the lowest so far."""
        error = torch.cat(self._over_rows(_weighted_error, low, high))
        better = error < self.best_error
        self.best_error = torch.where(better, error, self.best_error)
        self.best = (
            torch.where(better, low, self.best[0]),
            torch.where(better, high, self.best[1]),
        )

    def _over_rows(self, function: Callable[..., Any], low: Tensor, high: Tensor) -> list[Any]:
        """:return: the results of slices of rows, in order"""

        def arguments(size: int | None) -> Iterator[tuple[Any, ...]]:
            rows = len(low) if size is None else max(1, size // self.weight[0].numel())
            for start in range(0, len(low), rows):
                part = slice(start, start + rows)
                yield self.grid, self.weight[part], self.importance, low[part], high[part]

        return self.compute.run(function, arguments, low.device)

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
