"""
Integer weights of 2 to 8 bits, symmetric and asymmetric, per group or per channel.

SignRound (https://arxiv.org/abs/2309.05516) learns three things for a weight W that
is cut into groups along its input dimension:

- V, one number per weight, is added before rounding: ``q = clamp(round(W / s + V) + z)``;
- alpha and beta, one number per group each, shrink the range ``[alpha * min(W), beta * max(W)]``
  from which the scale ``s`` and the zero point ``z`` follow.

Integers are signed, as compressed-tensors stores them: ``q`` in ``[-2^(b-1), 2^(b-1) - 1]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from autoround_modifier.formats.base import QuantizedWeight, RoundingFormat
from autoround_modifier.formats.fusion import SLICE_ELEMENTS, fuse

__all__ = [
    "IntegerFormat",
    "IntegerGrid",
    "asymmetric_qparams",
    "integer_quantize",
    "integer_range",
    "symmetric_scale",
]


def integer_range(num_bits: int) -> tuple[int, int]:
    """:return: smallest and largest signed integer of ``num_bits`` bits"""
    return -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest even; the gradient passes straight through."""
    return x + (x.round() - x).detach()


def cast_ste(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``x`` to the values of ``dtype``, keep its own dtype; straight-through gradient."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def scale_floor(dtype: torch.dtype) -> float:
    """:return: the smallest scale used, so that a group of zeros does not divide by zero"""
    return 2.0**-20 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal


def symmetric_scale(
    w_min: Tensor, w_max: Tensor, num_bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """
    Signed full-range scale: the weight of largest magnitude falls on ``-2^(b-1)``, so that all
    ``2^b`` integers are used. The scale is negative where that weight is positive.

    :param w_min: lower end of each group's range, <= 0, any shape
    :param w_max: upper end of each group's range, >= 0, same shape
    :param dtype: dtype the scale is saved in; the result holds only its values
    :return: float32 scale, same shape
    """
    q_min, _ = integer_range(num_bits)
    scale = torch.where(w_max > -w_min, w_max, w_min) / q_min
    floor = scale_floor(dtype)
    magnitude = scale.abs().clamp(min=floor)
    return cast_ste(torch.where(scale < 0, -magnitude, magnitude), dtype)


def asymmetric_qparams(
    w_min: Tensor, w_max: Tensor, num_bits: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """
    Scale and zero point that map ``[w_min, w_max]`` onto all ``2^b`` integers.

    :param w_min: lower end of each group's range, <= 0, any shape
    :param w_max: upper end of each group's range, >= 0, same shape
    :param dtype: dtype the scale is saved in
    :return: float32 scale, and the signed zero point as float32 holding integers
    """
    q_min, q_max = integer_range(num_bits)
    scale = cast_ste(((w_max - w_min) / (q_max - q_min)).clamp(min=scale_floor(dtype)), dtype)
    zero_point = round_ste(q_min - w_min / scale).clamp(q_min, q_max)
    return scale, zero_point


def integer_quantize(
    weight: Tensor, rounding: Tensor | None, scale: Tensor, zero_point: Tensor, num_bits: int
) -> Tensor:
    """
    ``clamp(round(W / s + V) + z)``, differentiable in V, s and z (SignRound).

    :param weight: (..., groups, group_size), any float dtype
    :param rounding: V, same shape, or None for rounding to nearest
    :param scale: (..., groups, 1), float32, not zero
    :param zero_point: (..., groups, 1), float32 holding integers
    :return: same shape as ``weight``, float32 holding integers
    """
    x = weight.float() / scale
    if rounding is not None:
        x = x + rounding
    return (round_ste(x) + zero_point).clamp(*integer_range(num_bits))


@dataclass(frozen=True)
class IntegerGrid:
    """How groups are quantized; hashable, so that a compiled function can depend on it."""

    num_bits: int
    symmetric: bool
    dtype: torch.dtype  # of the saved scale and the dequantized weight

    @classmethod
    def of(cls, args: QuantizationArgs, dtype: torch.dtype) -> IntegerGrid:
        assert args.num_bits is not None
        return cls(args.num_bits, bool(args.symmetric), dtype)

    def qparams(
        self,
        w_min: Tensor,
        w_max: Tensor,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:return: scale and zero point of the ranges, (..., groups, 1), float32"""
        w_min = w_min if alpha is None else w_min * alpha
        w_max = w_max if beta is None else w_max * beta
        if self.symmetric:
            scale = symmetric_scale(w_min, w_max, self.num_bits, self.dtype)
            zero_point = torch.zeros_like(scale)
        else:
            scale, zero_point = asymmetric_qparams(w_min, w_max, self.num_bits, self.dtype)
        return scale.unsqueeze(-1), zero_point.unsqueeze(-1)

    def quantize(
        self,
        weight: Tensor,
        w_min: Tensor,
        w_max: Tensor,
        rounding: Tensor | None = None,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:return: q - z of each weight, float32, and scale and zero point, (..., groups, 1)"""
        scale, zero_point = self.qparams(w_min, w_max, alpha, beta)
        q = integer_quantize(weight, rounding, scale, zero_point, self.num_bits)
        return q - zero_point, scale, zero_point


def _dequantize(grid: IntegerGrid, *state: Tensor) -> Tensor:
    """:return: dequantized weight of each group; the state are arguments of `grid.quantize`"""
    steps, scale, _ = grid.quantize(*state)
    return (steps * scale).to(grid.dtype)


def _descend(
    grid: IntegerGrid,
    gradient: Tensor,
    rounding_lr: Tensor,
    clipping_lr: Tensor,
    clipping_limit: float,
    weight: Tensor,
    w_min: Tensor,
    w_max: Tensor,
    rounding: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
) -> None:
    """Update V, alpha and beta of each group in place; gradient: (groups, group_size)."""

    def dequantize(rounding: Tensor, *clipping: Tensor) -> Tensor:
        steps, scale, _ = grid.quantize(weight, w_min, w_max, rounding, *clipping)
        return steps * scale

    clipping = [] if alpha is None or beta is None else [alpha, beta]
    _, pull_back = torch.func.vjp(dequantize, rounding.float(), *clipping)  # type: ignore[misc]
    d_rounding, *d_clipping = pull_back(gradient.float())
    rounding.sub_((rounding_lr * d_rounding.sign()).to(rounding.dtype))
    for factor, d_factor in zip(clipping, d_clipping, strict=True):
        factor.sub_(clipping_lr * d_factor.sign()).clamp_(0.0, clipping_limit)


_fused_dequantize = fuse(_dequantize)
_fused_descend = fuse(_descend)


class IntegerFormat(RoundingFormat):
    """
    The tuned state of one integer weight: V, alpha and beta, and what follows from them.

    :param weight: (out_features, in_features), the full-precision weight, any float dtype
    :param args: integer weight arguments with strategy ``group`` or ``channel``
    :param initial_range: (w_min, w_max), each (out_features, groups), float32: the range found by
        a search; None for the minimum and maximum of each group
    :param fused: compute with `torch.compile`; the values are the same, sooner
    """

    def __init__(
        self,
        weight: Tensor,
        args: QuantizationArgs,
        initial_range: tuple[Tensor, Tensor] | None = None,
        fused: bool = False,
    ):
        super().__init__()
        self.grid = IntegerGrid.of(args, weight.dtype)
        self.num_bits = self.grid.num_bits
        self.shape = weight.shape
        self.weight = weight.detach().reshape(-1, group_size_of(weight, args))
        if initial_range is None:
            self.w_min = self.weight.amin(-1).float().clamp_(max=0)
            self.w_max = self.weight.amax(-1).float().clamp_(min=0)
        else:
            self.w_min, self.w_max = (bound.flatten() for bound in initial_range)
        # A searched range may also grow (SignRoundV2); the observed one only shrinks.
        self.clipping_limit = 1.0 if initial_range is None else 2.0
        self.fused = fused

    def make_trainable(self, tune_clipping: bool) -> None:
        # float16 resolves V, which stays within about one integer step, to 1/2048 or finer
        self.rounding = torch.zeros_like(self.weight, dtype=torch.float16)
        self.clipping = [torch.ones_like(self.w_min) for _ in range(2)] if tune_clipping else []

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        values, scales, zero_points = [], [], []
        for state in self._slices(fused=False):  # seldom needed: not worth another compilation
            steps, scale, zero_point = self.grid.quantize(*state)
            values.append((steps + zero_point).to(torch.int8))
            scales.append(scale.to(self.grid.dtype))
            zero_points.append(zero_point.to(torch.int8))
        return QuantizedWeight(
            values=torch.cat(values).view(self.shape),
            scale=torch.cat(scales).view(self.shape[0], -1),
            zero_point=torch.cat(zero_points).view(self.shape[0], -1),
        )

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        dequantize = _fused_dequantize if self.fused else _dequantize
        parts = [dequantize(self.grid, *state) for state in self._slices(fused=self.fused)]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).view(self.shape)

    @torch.no_grad()
    def descend(self, gradient: Tensor, rounding_lr: Tensor, clipping_lr: Tensor) -> None:
        descend = _fused_descend if self.fused else _descend
        lrs = rounding_lr, clipping_lr, self.clipping_limit
        parts = self._slices(gradient.reshape(self.weight.shape), fused=self.fused)
        for part, *state in parts:
            descend(self.grid, part, *lrs, *state)

    def _slices(self, *more: Tensor, fused: bool) -> Iterator[tuple[Tensor, ...]]:
        """
        ``more`` and the state, cut along the groups. Without fusion every operation writes its
        result to memory; slices that fit the processor's cache make that several times faster.
        """
        tensors = [*more, self.weight, self.w_min, self.w_max]
        if self.rounding is not None:
            tensors += [self.rounding, *self.clipping]
        groups, group_size = self.weight.shape
        rows = groups if fused else max(1, SLICE_ELEMENTS // group_size)
        return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def group_size_of(weight: Tensor, args: QuantizationArgs) -> int:
    """:return: weights in each group; a whole row for strategy ``channel``"""
    if args.strategy == QuantizationStrategy.GROUP:
        assert args.group_size is not None
        return args.group_size
    return weight.shape[-1]
