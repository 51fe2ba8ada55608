"""
The tuned state of a weight whose groups are quantized to a grid: every family's format.

SignRound (https://arxiv.org/abs/2309.05516) learns V, one number per weight, and alpha and beta,
one per group each; what they do is the grid's matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor

from autoround_modifier.formats.base import QuantizedWeight, RoundingFormat
from autoround_modifier.formats.fusion import SLICE_ELEMENTS, fuse
from autoround_modifier.formats.grid import Grid
from autoround_modifier.formats.grouping import Grouping, observed_range
from autoround_modifier.formats.speed import channel_speed

__all__ = ["GroupFormat"]


def _dequantize(
    grid: Grid, weight: Tensor, w_min: Tensor, w_max: Tensor, *rest: Tensor | None
) -> Tensor:
    """:return: dequantized weight of each group; the state are arguments of `grid.quantize`"""
    steps, scale, _ = grid.quantize(weight, w_min, w_max, *rest)
    return (steps * grid.effective_scale(scale, rest[0])).to(grid.dtype)


def _descend(
    grid: Grid,
    gradient: Tensor,
    channel_speeds: Tensor | None,
    rounding_lr: Tensor,
    clipping_lr: Tensor,
    clipping_limit: float,
    weight: Tensor,
    w_min: Tensor,
    w_max: Tensor,
    global_scale: Tensor | None,
    rounding: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
) -> None:
    """
    Update V, alpha and beta of each group in place; gradient: (groups, group_size).

    :param channel_speeds: factors of V's step for the columns of groups that lie side by side,
        (groups_across, columns of a group); or None. The groups are those of whole rows of tiles
    """

    def dequantize(rounding: Tensor, *clipping: Tensor) -> tuple[Tensor, Tensor]:
        steps, scale, _ = grid.quantize(weight, w_min, w_max, global_scale, rounding, *clipping)
        scale = grid.effective_scale(scale, global_scale)
        return steps * scale, scale

    clipping = [] if alpha is None or beta is None else [alpha, beta]
    _, pull_back, scale = torch.func.vjp(  # type: ignore[misc]
        dequantize, rounding.float(), *clipping, has_aux=True
    )
    d_rounding, *d_clipping = pull_back(gradient.float())
    step = rounding_lr * grid.rounding_speed(weight, scale) * d_rounding.sign()
    if channel_speeds is not None:
        across, width = channel_speeds.shape
        tiles = step.unflatten(0, (-1, across)).unflatten(-1, (-1, width))
        step = (tiles * channel_speeds.unsqueeze(1)).view(step.shape)
    rounding.sub_(step.to(rounding.dtype))
    for factor, d_factor in zip(clipping, d_clipping, strict=True):
        factor.sub_(clipping_lr * d_factor.sign()).clamp_(0.0, clipping_limit)


_fused_dequantize = fuse(_dequantize)
_fused_descend = fuse(_descend)


class GroupFormat(RoundingFormat):
    """
    :param weight: (out_features, in_features), the full-precision weight, any float dtype
    :param args: weight arguments
    :param grid: the values it can take
    :param initial_range: (w_min, w_max), each (groups,) or of the scale's shape, float32: the
        range found by a search; None for the minimum and maximum of each group
    :param global_scale: (1,), float32, for families that have one
    :param importance: of input channels, (in_features,), by which sign steps of V differ in length
        (`channel_speed`); None for equal ones
    :param fused: compute with `torch.compile`; the values are the same, sooner
    """

    def __init__(
        self,
        weight: Tensor,
        args: QuantizationArgs,
        grid: Grid,
        initial_range: tuple[Tensor, Tensor] | None = None,
        global_scale: Tensor | None = None,
        importance: Tensor | None = None,
        fused: bool = False,
    ):
        super().__init__()
        assert args.num_bits is not None
        self.num_bits = args.num_bits
        self.is_integer = args.type == QuantizationType.INT
        self.grid = grid
        self.grouping = Grouping.of(weight.shape, args)
        self.weight = self.grouping.split(weight.detach())
        if initial_range is None:
            self.w_min, self.w_max = observed_range(self.weight)
        else:
            self.w_min, self.w_max = (bound.flatten() for bound in initial_range)
        self.global_scale = global_scale
        self.channel_speeds = None
        if importance is not None:
            self.channel_speeds = self.grouping.split_channels(channel_speed(importance))
        self.searched = initial_range is not None
        self.fused = fused

    def make_trainable(self, tune_clipping: bool | None = None) -> None:
        tune_clipping = self.grid.tune_clipping if tune_clipping is None else tune_clipping
        if self.grouping.scale_shape == (1,):
            tune_clipping = False  # the only scale of a tensor may be shared by several layers
        # float16 resolves V, which seldom goes beyond one step, to 1/2048 or finer there
        self.rounding = torch.zeros_like(self.weight, dtype=torch.float16)
        self.clipping = [torch.ones_like(self.w_min) for _ in range(2)] if tune_clipping else []

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        values, scales, zero_points = [], [], []
        for weight, w_min, w_max, *rest in self._slices(fused=False):  # seldom: not compiled
            steps, scale, zero_point = self.grid.quantize(weight, w_min, w_max, *rest)
            values.append((steps + zero_point).to(self.grid.code_dtype))
            scales.append(scale.to(self.grid.dtype))
            zero_points.append(zero_point.to(torch.int8))
        shape = self.grouping.scale_shape
        return QuantizedWeight(
            values=self.grouping.join(torch.cat(values)),
            scale=torch.cat(scales).view(shape),
            zero_point=torch.cat(zero_points).view(shape),
            grouping=self.grouping,
            global_scale=self.global_scale,
        )

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        dequantize = _fused_dequantize if self.fused else _dequantize
        parts = [dequantize(self.grid, *state) for state in self._slices(fused=self.fused)]
        return self.grouping.join(torch.cat(parts) if len(parts) > 1 else parts[0])

    @torch.no_grad()
    def descend(self, gradient: Tensor, rounding_lr: Tensor, clipping_lr: Tensor) -> None:
        descend = _fused_descend if self.fused else _descend
        shared = self.channel_speeds, rounding_lr, clipping_lr, self.clipping_limit
        parts = self._slices(self.grouping.split(gradient), fused=self.fused)
        for part, *state in parts:
            descend(self.grid, part, *shared, *state)

    def _slices(self, *more: Tensor, fused: bool) -> Iterator[tuple[Any, ...]]:
        """
        ``more`` and the state, cut along the groups, between rows of tiles. Without fusion every
        operation writes its result to memory; slices that fit the processor's cache make that
        several times faster.
        """
        groups, group_size = self.weight.shape
        repeated = None if self.global_scale is None else self.global_scale.expand(groups)
        tensors = [*more, self.weight, self.w_min, self.w_max, repeated]
        if self.rounding is not None:
            tensors += [self.rounding, *self.clipping]
        across = self.grouping.groups_across
        size = groups if fused else across * max(1, SLICE_ELEMENTS // (across * group_size))
        for start in range(0, groups, size):
            part = slice(start, start + size)
            yield tuple(None if tensor is None else tensor[part] for tensor in tensors)
