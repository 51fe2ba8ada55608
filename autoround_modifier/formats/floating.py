"""
Floating-point weights: FP8, MXFP4, MXFP8 and NVFP4.

A grid of floating-point numbers has no single step: E2M1 moves by 0.5 near 0 and by 2 near 6. V
is therefore measured in local steps, ``q = round(x + V * step(x))`` with ``x = W / s``, so that one
unit of V means the same for small and large weights. With integers, whose step is 1 everywhere,
that is SignRound's formula.

Rounding a weight to the farther of its two neighbours changes the loss by up to the square of the
local step: 16 times more for a large weight of E2M1 than for a small one. The sign of a gradient
does not show that. So sign steps on E2M1 are divided by the local step to the power of 1.5
(measured in docs/benchmarks/formats.md). On E4M3 they are equal: 8 bits leave little to gain.

Elements are those of the OCP formats: E4M3 (OCP 8-bit Floating Point Specification, section 5,
without infinities) and E2M1 (OCP Microscaling Formats v1.0, section 5.3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoround_modifier.formats.grid import ScaledGrid, cast_ste, scale_floor

__all__ = ["E2M1", "E4M3", "FloatElement", "FloatGrid", "MicroscalingGrid", "NVFP4Grid"]

FLOAT32_MANTISSA_BITS = 23
FLOAT32_BIAS = 127


@dataclass(frozen=True)
class FloatElement:
    """
    :param mantissa_bits: without the leading one
    :param min_exponent: of the smallest normal number; subnormal ones have its step
    :param max_value: largest number
    :param speed: factor of V's sign step where neighbours are 1 apart, if it falls with their
        distance to the power of 1.5; None if it is 1 everywhere
    """

    mantissa_bits: int
    min_exponent: int
    max_value: float
    speed: float | None = None

    @property
    def max_exponent(self) -> int:
        return int(self.max_value).bit_length() - 1

    def step(self, x: Tensor) -> Tensor:
        """:return: distance between neighbouring numbers at ``x``, float32, without gradient"""
        return power_of_two(self._step_exponent(x))

    def inverse_step(self, x: Tensor) -> Tensor:
        """:return: 1 / `step`, exact"""
        return power_of_two(-self._step_exponent(x))

    def _step_exponent(self, x: Tensor) -> Tensor:
        return exponent_of(x.detach()).clamp(min=self.min_exponent) - self.mantissa_bits

    def round(self, x: Tensor, rounding: Tensor | None = None) -> Tensor:
        """
        The nearest number, ties to even, of ``x + V * step(x)``; straight-through gradient, zero
        beyond the largest number.

        :param x: float32
        :param rounding: V, same shape, in local steps; or None
        """
        if rounding is not None:
            x = x + rounding * self.step(x)
        x = x.clamp(-self.max_value, self.max_value)
        step = self.step(x)
        return x + ((x / step).round() * step - x).detach()


E4M3 = FloatElement(mantissa_bits=3, min_exponent=-6, max_value=448.0)
# Sign steps are 2, 0.7 and 1/4 of `lr` where numbers are 1/2, 1 and 2 apart.
E2M1 = FloatElement(mantissa_bits=1, min_exponent=0, max_value=6.0, speed=0.5**0.5)


def exponent_of(x: Tensor) -> Tensor:
    """:return: floor(log2(abs(x))), int32, exact; -127 for zero and subnormal float32"""
    bits = x.float().view(torch.int32)
    return ((bits >> FLOAT32_MANTISSA_BITS) & 0xFF) - FLOAT32_BIAS


def power_of_two(exponent: Tensor) -> Tensor:
    """:return: 2^exponent, float32, exact; exponent: int32 in [-126, 127]"""
    return ((exponent + FLOAT32_BIAS) << FLOAT32_MANTISSA_BITS).view(torch.float32)


@dataclass(frozen=True)
class FloatGrid(ScaledGrid):
    """
    Numbers of ``element`` times a scale in the weight's dtype: FP8.

    The largest weight falls on the largest number.
    """

    element: FloatElement
    # holds the numbers of E4M3, and those of E2M1, which are some of them
    code_dtype = torch.float8_e4m3fn
    # A sign step that crosses to the next scale of a coarse grid moves the whole group at once.
    tune_clipping = False

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
        low = -w_min if alpha is None else -w_min * alpha
        high = w_max if beta is None else w_max * beta
        scale = self.scale(torch.maximum(low, high), global_scale).unsqueeze(-1)
        x = weight.float() / self.effective_scale(scale, global_scale)
        return self.element.round(x, rounding), scale, torch.zeros_like(scale)

    def rounding_speed(self, weight: Tensor, scale: Tensor) -> Tensor | float:
        if self.element.speed is None:
            return 1.0
        # Without a division of a number by a tensor, which Inductor does not round to nearest.
        density = self.element.inverse_step(weight.float() / scale)
        return self.element.speed * (density * density.sqrt())

    def scale(self, amax: Tensor, global_scale: Tensor | None) -> Tensor:
        """:return: the saved scale of groups whose largest magnitude is ``amax``, float32"""
        scale = (amax / self.element.max_value).clamp(min=scale_floor(self.scale_dtype))
        return cast_ste(scale, self.scale_dtype)


@dataclass(frozen=True)
class MicroscalingGrid(FloatGrid):
    """
    MXFP4 and MXFP8: the scale is a power of two (OCP Microscaling Formats v1.0, section 6.3).

    As compressed-tensors: the exponent of the largest weight, rounded up from 1.75, less that of
    the largest number.
    """

    def scale(self, amax: Tensor, global_scale: Tensor | None) -> Tensor:
        offset = self.element.max_exponent
        exponent = exponent_of(amax.detach() / 0.875) - offset
        scale = power_of_two(exponent.clamp(-FLOAT32_BIAS + 1, FLOAT32_BIAS))
        smooth = amax * 2.0**-offset
        return smooth + (scale - smooth).detach()


@dataclass(frozen=True)
class NVFP4Grid(FloatGrid):
    """
    NVFP4: E2M1 times a scale in E4M3, over one float32 scale of the whole tensor.
    """

    # E4M3's smallest subnormal number
    SMALLEST_SCALE = 2.0**-9

    def scale(self, amax: Tensor, global_scale: Tensor | None) -> Tensor:
        assert global_scale is not None
        local = amax / self.element.max_value * global_scale
        local = local.clamp(self.SMALLEST_SCALE, E4M3.max_value)
        return E4M3.round(local)
