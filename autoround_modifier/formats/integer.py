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

from dataclasses import dataclass

import torch
from torch import Tensor

from autoround_modifier.formats.grid import ScaledGrid, cast_ste, round_ste, scale_floor

__all__ = [
    "IntegerGrid",
    "asymmetric_qparams",
    "integer_quantize",
    "integer_range",
    "symmetric_scale",
]


def integer_range(num_bits: int) -> tuple[int, int]:
    """:return: smallest and largest signed integer of ``num_bits`` bits"""
    return -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1


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
class IntegerGrid(ScaledGrid):
    """All integers of ``num_bits`` bits, with or without a zero point."""

    num_bits: int
    symmetric: bool
    code_dtype = torch.int8
    tune_clipping = True

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
            scale = symmetric_scale(w_min, w_max, self.num_bits, self.scale_dtype)
            zero_point = torch.zeros_like(scale)
        else:
            scale, zero_point = asymmetric_qparams(w_min, w_max, self.num_bits, self.scale_dtype)
        return scale.unsqueeze(-1), zero_point.unsqueeze(-1)

    def quantize(
        self,
        weight: Tensor,
        w_min: Tensor,
        w_max: Tensor,
        global_scale: Tensor | None = None,
        rounding: Tensor | None = None,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero_point = self.qparams(w_min, w_max, alpha, beta)
        q = integer_quantize(weight, rounding, scale, zero_point, self.num_bits)
        return q - zero_point, scale, zero_point
