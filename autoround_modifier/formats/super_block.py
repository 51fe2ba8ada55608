"""
K-quants, the formats of llama.cpp whose scales are quantized themselves: Q2_K to Q6_K.

A row is cut into super-blocks of 256 weights, and these into sub-blocks of 16 or 32, the groups. A
sub-block has an integer scale ``sc`` and, where the format is asymmetric, an integer minimum
``mn``. All of a super-block are multiples of two float16 numbers, ``d`` and ``dmin``:

- Q2_K, Q4_K, Q5_K: ``w = d * sc * q - dmin * mn``, ``q`` from 0, ``sc`` and ``mn`` unsigned. The
  minimum is no multiple of the scale, as a zero point is;
- Q3_K, Q6_K: ``w = d * sc * q``, ``q`` and ``sc`` signed.

While weights are tuned, the gradient passes straight through the rounding to float16, that of
``sc`` and ``mn``, and that of ``q``. Weights are dequantized in the order of ggml's
``dequantize_row_q*_K``, in float32: ``(d * sc) * q - (dmin * mn)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from autoround_modifier.formats.grid import Grid, cast_ste, round_ste
from autoround_modifier.formats.grouping import Grouping
from autoround_modifier.formats.integer import integer_range, symmetric_scale

__all__ = ["SUPER_BLOCK", "SUPER_BLOCK_SPECS", "SubScales", "SuperBlockGrid", "SuperBlockSpec"]

# Weights of a super-block, `QK_K` in ggml
SUPER_BLOCK = 256
# The smallest positive number of float16
SMALLEST_UNIT = 2.0**-24


class SubScales(NamedTuple):
    """
    The quantized scales and minima of sub-blocks, float32.

    :ivar d: (..., super-blocks, 1), a value of float16
    :ivar scales: ``sc``, (..., super-blocks, sub-blocks of each), integers, not 0
    :ivar dmin: as ``d``; 0 if symmetric
    :ivar mins: ``mn``, as ``scales``, from 0; 0 if symmetric
    """

    d: Tensor
    scales: Tensor
    dmin: Tensor
    mins: Tensor

    def scale(self) -> Tensor:
        """:return: the step of each sub-block, (..., sub-blocks, 1)"""
        return (self.d * self.scales).flatten(-2).unsqueeze(-1)

    def low(self) -> Tensor:
        """:return: what is subtracted in each sub-block, (..., sub-blocks, 1)"""
        return (self.dmin * self.mins).flatten(-2).unsqueeze(-1)


@dataclass(frozen=True)
class SuperBlockGrid(Grid):
    """
    :param num_bits: of ``q``
    :param scale_bits: of ``sc`` and ``mn``
    :param symmetric: whether there is no minimum, and ``q`` and ``sc`` are signed
    :param sub_blocks: in a super-block
    """

    num_bits: int
    scale_bits: int
    symmetric: bool
    sub_blocks: int
    tune_clipping = True

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest ``q``."""
        return integer_range(self.num_bits) if self.symmetric else (0, 2**self.num_bits - 1)

    @property
    def scale_range(self) -> tuple[int, int]:
        """Smallest and largest ``sc``."""
        return integer_range(self.scale_bits) if self.symmetric else (1, 2**self.scale_bits - 1)

    @property
    def full_scale(self) -> int:
        """``sc`` of the sub-block with the largest scale; and the largest ``mn``."""
        lowest, highest = self.scale_range
        return lowest if self.symmetric else highest

    def sub_scales(
        self,
        w_min: Tensor,
        w_max: Tensor,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> SubScales:
        """
        The scale that the range of each sub-block asks for, and the minimum, quantized. The largest
        of a super-block become `full_scale`.

        :param w_min: (..., sub-blocks), float32; so are the others
        """
        w_min = w_min if alpha is None else w_min * alpha
        w_max = w_max if beta is None else w_max * beta
        if self.symmetric:
            wanted = symmetric_scale(w_min, w_max, self.num_bits)
            wanted = wanted.unflatten(-1, (-1, self.sub_blocks))
            largest = wanted.gather(-1, wanted.detach().abs().argmax(-1, keepdim=True))
            d = self.unit(largest / self.full_scale)
            nothing = torch.zeros_like(d), torch.zeros_like(wanted)
            return SubScales(d, self._scales(wanted, d), *nothing)
        low = -w_min
        wanted = ((w_max + low) / self.code_range[1]).unflatten(-1, (-1, self.sub_blocks))
        low = low.unflatten(-1, (-1, self.sub_blocks))
        d = self.unit(wanted.amax(-1, keepdim=True) / self.full_scale)
        dmin = self.unit(low.amax(-1, keepdim=True) / self.full_scale)
        mins = round_ste(low / dmin).clamp(0, self.full_scale)
        return SubScales(d, self._scales(wanted, d), dmin, mins)

    def unit(self, wanted: Tensor) -> Tensor:
        """:return: ``d`` or ``dmin``: the nearest of float16, not 0; straight-through gradient"""
        magnitude = wanted.abs().clamp(min=SMALLEST_UNIT)
        return cast_ste(torch.where(wanted < 0, -magnitude, magnitude), self.scale_dtype)

    def _scales(self, wanted: Tensor, d: Tensor) -> Tensor:
        """:return: ``sc``; a scale of 0 would be no better than the smallest one"""
        ratio = wanted / d
        scales = round_ste(ratio).clamp(*self.scale_range)
        smallest = torch.where(ratio < 0, -1.0, 1.0)
        return scales + (torch.where(scales == 0, smallest, scales) - scales).detach()

    def codes(
        self, weight: Tensor, scale: Tensor, low: Tensor, rounding: Tensor | None = None
    ) -> Tensor:
        """
        ``q = clamp(round((w + dmin * mn) / (d * sc) + V))``, differentiable in all but ``w``.

        :param weight: (..., sub-blocks, sub-block), any float dtype
        :param scale: ``d * sc``, (..., sub-blocks, 1), not 0
        :param low: ``dmin * mn``, the same shape
        :param rounding: V, the shape of ``weight``, or None
        :return: the shape of ``weight``, float32 holding integers
        """
        x = (weight.float() + low) / scale
        if rounding is not None:
            x = x + rounding
        return round_ste(x).clamp(*self.code_range)

    def fake_quantize(
        self,
        weight: Tensor,
        w_min: Tensor,
        w_max: Tensor,
        global_scale: Tensor | None = None,
        rounding: Tensor | None = None,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        found = self.sub_scales(w_min, w_max, alpha, beta)
        scale, low = found.scale(), found.low()
        return scale * self.codes(weight, scale, low, rounding) - low, scale

    def quantize_parts(
        self,
        weight: Tensor,
        w_min: Tensor,
        w_max: Tensor,
        global_scale: Tensor | None = None,
        rounding: Tensor | None = None,
        alpha: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        :return: ``values``, ``q``, the shape of ``weight``; ``d``, (super-blocks,), float16;
            ``scales``, ``sc``, (super-blocks, sub-blocks of each); and ``dmin`` and ``mins``
            likewise if asymmetric. Integers are int8 if symmetric, else uint8
        """
        found = self.sub_scales(w_min, w_max, alpha, beta)
        integer = torch.int8 if self.symmetric else torch.uint8
        parts = {
            "values": self.codes(weight, found.scale(), found.low(), rounding).to(integer),
            "d": found.d.squeeze(-1).to(self.scale_dtype),
            "scales": found.scales.to(integer),
        }
        if not self.symmetric:
            parts |= {
                "dmin": found.dmin.squeeze(-1).to(self.scale_dtype),
                "mins": found.mins.to(integer),
            }
        return parts

    def dequantize(self, parts: dict[str, Tensor], grouping: Grouping) -> Tensor:
        scale = parts["d"].float().unsqueeze(-1) * parts["scales"].float()
        weight = scale.view(-1, 1) * grouping.split(parts["values"]).float()
        if not self.symmetric:
            low = parts["dmin"].float().unsqueeze(-1) * parts["mins"].float()
            weight = weight - low.view(-1, 1)
        return grouping.join(weight.to(self.dtype))


@dataclass(frozen=True)
class SuperBlockSpec:
    """
    :param num_bits: of one value, without scales
    :param group_size: weights of a sub-block
    :param scale_bits: of the scale of a sub-block, and of its minimum
    :param symmetric: without a minimum
    """

    num_bits: int
    group_size: int
    scale_bits: int
    symmetric: bool
    is_integer: ClassVar[bool] = True
    global_scale: ClassVar[bool] = False
    strategy: ClassVar[Literal["group"]] = "group"

    def grid(self, dtype: torch.dtype) -> SuperBlockGrid:
        return SuperBlockGrid(
            dtype,
            torch.float16,
            self.num_bits,
            self.scale_bits,
            self.symmetric,
            SUPER_BLOCK // self.group_size,
        )

    def grouping(self, shape: tuple[int, ...]) -> Grouping:
        """:raises ValueError: if rows are not whole super-blocks"""
        rows, columns = shape
        if columns % SUPER_BLOCK:
            raise ValueError(
                f"rows of {columns} weights cannot be cut into super-blocks of {SUPER_BLOCK}"
            )
        return Grouping((rows, columns), (1, self.group_size), (rows, columns // self.group_size))


# By the names of llama.cpp, in lower case (`block_q*_K` in ggml-common.h)
SUPER_BLOCK_SPECS: dict[str, SuperBlockSpec] = {
    "q2_k": SuperBlockSpec(2, 16, 4, False),
    "q3_k": SuperBlockSpec(3, 16, 6, True),
    "q4_k": SuperBlockSpec(4, 32, 6, False),
    "q5_k": SuperBlockSpec(5, 32, 6, False),
    "q6_k": SuperBlockSpec(6, 16, 8, True),
}
