"""
The tuned state of one weight, whatever its format.

SignRound (https://arxiv.org/abs/2309.05516) learns V, one number per weight, and alpha and beta,
one per group each. How they act on the weight is defined by the grid.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from autoround_modifier.device import Compute, slice_elements
from autoround_modifier.formats.grid import Grid
from autoround_modifier.formats.grouping import observed_range
from autoround_modifier.formats.quantized_weight import QuantizedWeight
from autoround_modifier.formats.spec import FormatSpec
from autoround_modifier.formats.speed import channel_speed

__all__ = ["TunedWeight"]


class TunedWeight:
    """
    Before `make_trainable` the weight is rounded to nearest.

    :param weight: (out_features, in_features), the full-precision weight, any float dtype
    :param spec: what it is quantized to
    :param initial_range: (w_min, w_max), each (groups,) or of the scale's shape, float32: the
        range found by a search; None for the minimum and maximum of each group
    :param global_scale: (1,), float32, for formats that have one
    :param importance: of input channels, (in_features,), by which sign steps of V differ in length
        (`channel_speed`); None for equal ones
    :param compute: runs the quantization
    :ivar rounding: V, (groups, group_size), float16, or None
    :ivar clipping: alpha and beta, (groups,), float32, or empty
    :ivar searched: whether the clipping range was found by a search; if not, it is the observed one
    """

    def __init__(
        self,
        weight: Tensor,
        spec: FormatSpec,
        initial_range: tuple[Tensor, Tensor] | None = None,
        global_scale: Tensor | None = None,
        importance: Tensor | None = None,
        compute: Compute | None = None,
    ):
        self.num_bits = spec.num_bits
        self.is_integer = spec.is_integer
        self.grid = spec.grid(weight.dtype)
        self.grouping = spec.grouping(weight.shape)
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
        self.compute = compute or Compute()
        self.rounding: Tensor | None = None
        self.clipping: list[Tensor] = []

    @property
    def clipping_limit(self) -> float:
        """
        Upper limit of alpha and beta. A searched range may also grow (SignRoundV2); the observed
        one only shrinks.
        """
        return 2.0 if self.searched else 1.0

    def make_trainable(self, tune_clipping: bool | None = None) -> None:
        """
        Create V (zeros) and perhaps alpha and beta (ones).

        :param tune_clipping: whether to learn alpha and beta; None for what suits the format
        """
        tune_clipping = self.grid.tune_clipping if tune_clipping is None else tune_clipping
        if self.grouping.scale_shape == (1,):
            tune_clipping = False  # the only scale of a tensor may be shared by several layers
        # float16 resolves V, which seldom goes beyond one step, to 1/2048 or finer there
        self.rounding = torch.zeros_like(self.weight, dtype=torch.float16)
        self.clipping = [torch.ones_like(self.w_min) for _ in range(2)] if tune_clipping else []

    def untrained(self) -> TunedWeight:
        """:return: the same without V, alpha and beta, rounded to nearest; tensors are shared"""
        start = copy.copy(self)
        start.rounding, start.clipping = None, []
        return start

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """:return: the weight as it would be saved now, in tensors of its own"""
        slices = self._slices(slice_elements(self.weight.device))
        found = [self.grid.quantize_parts(*state) for state in slices]  # seldom: not compiled
        parts = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        parts = {name: self._shaped(name, part) for name, part in parts.items()}
        if self.global_scale is not None:
            parts["global_scale"] = self.global_scale
        return QuantizedWeight(parts, self.grid, self.grouping)

    def _shaped(self, name: str, part: Tensor) -> Tensor:
        """
        :return: ``values`` in the shape of the weight, one number of each group in that of the
            scale, and anything else as the grid made it, such as numbers of super-blocks
        """
        if name == "values":
            return self.grouping.join(part)
        one_each = len(part) == part.numel() == len(self.weight)
        return part.view(self.grouping.scale_shape) if one_each else part

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """:return: `quantized`, dequantized: (out_features, in_features), the weight's dtype"""

        def arguments(size: int | None) -> Iterator[tuple[Any, ...]]:
            return ((self.grid, *state) for state in self._slices(size))

        parts = self.compute.run(_dequantize, arguments, self.weight.device)
        return self.grouping.join(torch.cat(parts) if len(parts) > 1 else parts[0])

    @torch.no_grad()
    def descend(self, gradient: Tensor, rounding_lr: Tensor, clipping_lr: Tensor) -> None:
        """
        One sign-gradient step, in place: ``p <- p - lr * sign(dL/dp)`` for V, alpha and beta. For
        V each weight may have a factor of its own.

        :param gradient: dL/dW of the dequantized weight, (out_features, in_features)
        :param rounding_lr: step size of V, scalar
        :param clipping_lr: step size of alpha and beta, scalar
        """
        groups = self.grouping.split(gradient)
        shared = self.channel_speeds, rounding_lr, clipping_lr, self.clipping_limit

        def arguments(size: int | None) -> Iterator[tuple[Any, ...]]:
            for part, *state in self._slices(size, groups):
                yield (self.grid, part, *shared, *state)

        self.compute.run(_descend, arguments, self.weight.device)

    def _slices(self, size: int | None, *more: Tensor) -> Iterator[tuple[Any, ...]]:
        """
        Yield ``more`` and the state, cut along the groups, between rows of tiles: groups that lie
        side by side are in one slice.

        :param size: largest number of elements of a slice, unless a row of tiles has more; None
            does not cut
        """
        groups, group_size = self.weight.shape
        repeated = None if self.global_scale is None else self.global_scale.expand(groups)
        tensors = [*more, self.weight, self.w_min, self.w_max, repeated]
        if self.rounding is not None:
            tensors += [self.rounding, *self.clipping]
        across = self.grouping.groups_across
        step = groups if size is None else across * max(1, size // (across * group_size))
        for start in range(0, groups, step):
            part = slice(start, start + step)
            yield tuple(None if tensor is None else tensor[part] for tensor in tensors)


def _dequantize(grid: Grid, *state: Tensor | None) -> Tensor:
    """:return: dequantized weight of each group; the state are arguments of `Grid.fake_quantize`"""
    return grid.fake_quantize(*state)[0].to(grid.dtype)  # type: ignore[arg-type]


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
        return grid.fake_quantize(weight, w_min, w_max, global_scale, rounding, *clipping)

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
        factor.sub_(clipping_lr * d_factor.sign()).clamp_(SMALLEST_CLIPPING, clipping_limit)


# alpha and beta of zero would make a scale of zero.
SMALLEST_CLIPPING = 2.0**-10
