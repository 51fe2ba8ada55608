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

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from autoround_modifier.formats.base import QuantizedWeight, RoundingFormat

__all__ = [
    "IntegerFormat",
    "asymmetric_qparams",
    "integer_fake_quantize",
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


class _IntegerFakeQuantize(torch.autograd.Function):
    """Quantize-dequantize with the straight-through gradient written out, in few passes."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        rounding: Tensor | None,
        scale: Tensor,
        zero_point: Tensor,
        q_min: int,
        q_max: int,
    ) -> Tensor:
        scaled = weight / scale
        x = scaled if rounding is None else scaled + rounding
        q = x.round_().add_(zero_point)
        inside = (q >= q_min) & (q <= q_max)
        steps = q.clamp_(q_min, q_max).sub_(zero_point)  # q - z
        ctx.save_for_backward(weight, scale, steps, inside)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, steps, inside = ctx.saved_tensors
        grad_inside = grad * inside
        # d(s (q - z)) / dV = s where q is not clipped
        grad_rounding = grad_inside * scale if ctx.needs_input_grad[1] else None
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[2]:
            # d/ds = (q - z) - W / s where q is not clipped, (q - z) where it is
            direct = (grad * steps).sum(-1, keepdim=True)
            through = (grad_inside * weight).sum(-1, keepdim=True)
            grad_scale = direct - through / scale
        if ctx.needs_input_grad[3]:
            # d/dz = 0 where q is not clipped, -s where it is
            grad_zero_point = scale * (grad_inside - grad).sum(-1, keepdim=True)
        return None, grad_rounding, grad_scale, grad_zero_point, None, None


def integer_fake_quantize(
    weight: Tensor, rounding: Tensor | None, scale: Tensor, zero_point: Tensor, num_bits: int
) -> Tensor:
    """
    ``s * (clamp(round(W / s + V) + z) - z)``, differentiable in V, s and z (SignRound).

    :param weight: (..., groups, group_size), float32
    :param rounding: V, same shape, or None for rounding to nearest
    :param scale: (..., groups, 1), float32, not zero
    :param zero_point: (..., groups, 1), float32 holding integers
    :return: same shape as ``weight``, float32
    """
    q_min, q_max = integer_range(num_bits)
    return _IntegerFakeQuantize.apply(weight, rounding, scale, zero_point, q_min, q_max)


class IntegerFormat(RoundingFormat):
    """
    The tuned state of one integer weight: V, alpha and beta, and what follows from them.

    :param weight: (out_features, in_features), the full-precision weight, any float dtype
    :param args: integer weight arguments with strategy ``group`` or ``channel``
    :param initial_range: (w_min, w_max), each (out_features, groups), float32: the range found by
        a search; None for the minimum and maximum of each group
    """

    def __init__(
        self,
        weight: Tensor,
        args: QuantizationArgs,
        initial_range: tuple[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.num_bits = args.num_bits
        self.symmetric = args.symmetric
        self.dtype = weight.dtype
        self.shape = weight.shape
        self.weight = group_weight(weight, args)
        if initial_range is None:
            self.w_min = self.weight.amin(-1).clamp_(max=0)
            self.w_max = self.weight.amax(-1).clamp_(min=0)
        else:
            self.w_min, self.w_max = initial_range
        # A searched range may also grow (SignRoundV2); the observed one only shrinks.
        self.clipping_limit = 1.0 if initial_range is None else 2.0

    def make_trainable(self, tune_clipping: bool) -> None:
        self.rounding = torch.zeros_like(self.weight).requires_grad_()
        if tune_clipping:
            self.clipping = [
                torch.ones_like(bound).requires_grad_() for bound in (self.w_min, self.w_max)
            ]

    def qparams(self) -> tuple[Tensor, Tensor]:
        """:return: scale and zero point, each (out_features, groups, 1), float32"""
        w_min, w_max = self.w_min, self.w_max
        if self.clipping:
            alpha, beta = self.clipping
            w_min, w_max = w_min * alpha, w_max * beta
        if self.symmetric:
            scale = symmetric_scale(w_min, w_max, self.num_bits, self.dtype)
            zero_point = torch.zeros_like(scale)
        else:
            scale, zero_point = asymmetric_qparams(w_min, w_max, self.num_bits, self.dtype)
        return scale.unsqueeze(-1), zero_point.unsqueeze(-1)

    def forward(self) -> Tensor:
        scale, zero_point = self.qparams()
        weight = integer_fake_quantize(self.weight, self.rounding, scale, zero_point, self.num_bits)
        return weight.to(self.dtype).view(self.shape)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        scale, zero_point = self.qparams()
        q_min, q_max = integer_range(self.num_bits)
        x = self.weight / scale
        if self.rounding is not None:
            x = x + self.rounding
        q = (x.round_() + zero_point).clamp_(q_min, q_max)
        return QuantizedWeight(
            values=q.to(torch.int8).view(self.shape),
            scale=scale.squeeze(-1).to(self.dtype),
            zero_point=zero_point.squeeze(-1).to(torch.int8),
            dequantized=((q - zero_point) * scale).to(self.dtype).view(self.shape),
        )


def group_weight(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """
    :param weight: (out_features, in_features)
    :return: float32 copy, (out_features, groups, group_size); one group for strategy ``channel``
    """
    group_size = (
        args.group_size if args.strategy == QuantizationStrategy.GROUP else weight.shape[-1]
    )
    return weight.detach().float().unflatten(-1, (-1, group_size))
