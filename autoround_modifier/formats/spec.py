"""What a weight is quantized to, without reference to any library's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from autoround_modifier.formats.floating import E2M1, E4M3, FloatGrid, MicroscalingGrid, NVFP4Grid
from autoround_modifier.formats.grid import Grid
from autoround_modifier.formats.grouping import Grouping
from autoround_modifier.formats.integer import IntegerGrid

__all__ = ["FormatSpec", "WeightSpec"]

Strategy = Literal["tensor", "channel", "group", "block"]


class FormatSpec(Protocol):
    """
    A weight format. `WeightSpec` describes those of compressed-tensors, `SuperBlockSpec` those
    whose scales are quantized themselves; each defines its own `Grid`.

    :ivar num_bits: bits of one value, without scales
    :ivar is_integer: whether its values are evenly spaced
    :ivar strategy: what shares a scale, as in `WeightSpec`
    :ivar global_scale: whether all scales are relative to one of the tensor
    """

    @property
    def num_bits(self) -> int: ...

    @property
    def is_integer(self) -> bool: ...

    @property
    def strategy(self) -> Strategy: ...

    @property
    def global_scale(self) -> bool: ...

    def grid(self, dtype: torch.dtype) -> Grid:
        """:param dtype: of the weight, and of the dequantized weight"""

    def grouping(self, shape: tuple[int, ...]) -> Grouping:
        """:param shape: (out_features, in_features)"""


@dataclass(frozen=True)
class WeightSpec:
    """
    :param element: ``int``, signed integers; ``float``, E2M1 with 4 bits and E4M3 with 8
    :param num_bits: 2 to 8 for integers, 4 or 8 for floating-point numbers
    :param symmetric: without a zero point; floating-point numbers have none
    :param strategy: what shares a scale: the tensor, a row (``channel``), a piece of a row
        (``group``) or a rectangle (``block``)
    :param group_size: columns of a group
    :param block: rows and columns of a block
    :param power_of_two_scale: scales are powers of two (MXFP4, MXFP8)
    :param global_scale: scales are E4M3 under one float32 scale of the tensor (NVFP4)
    :param scale_dtype: in which scales are saved, and rounded to while tuning; None for the
        weight's
    """

    element: Literal["int", "float"]
    num_bits: int
    symmetric: bool = True
    strategy: Strategy = "group"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    power_of_two_scale: bool = False
    global_scale: bool = False
    scale_dtype: torch.dtype | None = None

    @property
    def is_integer(self) -> bool:
        return self.element == "int"

    def grid(self, dtype: torch.dtype) -> Grid:
        scale_dtype = self.scale_dtype or dtype
        if self.is_integer:
            return IntegerGrid(dtype, scale_dtype, self.num_bits, self.symmetric)
        element = E2M1 if self.num_bits == 4 else E4M3
        if self.global_scale:
            return NVFP4Grid(dtype, scale_dtype, element)
        kind = MicroscalingGrid if self.power_of_two_scale else FloatGrid
        return kind(dtype, scale_dtype, element)

    def grouping(self, shape: tuple[int, ...]) -> Grouping:
        rows, columns = shape
        if self.strategy == "tensor":
            return Grouping((rows, columns), (rows, columns), (1,))
        if self.strategy == "channel":
            tile = (1, columns)
        elif self.strategy == "block":
            assert self.block is not None
            tile = self.block
        else:
            assert self.group_size is not None
            tile = (1, self.group_size)
        across = (math.ceil(rows / tile[0]), math.ceil(columns / tile[1]))
        return Grouping((rows, columns), tile, across)
