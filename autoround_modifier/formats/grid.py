"""What a numeric family defines: the values that weights of one group can take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Grid", "cast_ste", "round_ste", "scale_floor"]


@dataclass(frozen=True)
class Grid(ABC):
    """
    How groups are quantized; hashable, so that a compiled function can depend on it.

    :param dtype: of the module's weight, its saved scale and the dequantized weight
    :cvar code_dtype: holds every value before it is scaled
    :cvar tune_clipping: whether alpha and beta are learned unless told otherwise
    """

    dtype: torch.dtype
    code_dtype: ClassVar[torch.dtype]
    tune_clipping: ClassVar[bool]

    @abstractmethod
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
        """
        Differentiable in V, alpha and beta.

        :param weight: (..., groups, group_size), any float dtype
        :param w_min: lower end of each group's range, <= 0, (..., groups), float32
        :param w_max: upper end, >= 0, same shape
        :param global_scale: of the whole weight, repeated for each group, (..., groups); None
            where the family has none
        :param rounding: V, the shape of ``weight``, or None for rounding to nearest
        :param alpha: factor of ``w_min``, or None
        :param beta: factor of ``w_max``, or None
        :return: values less the zero point, float32, the shape of ``weight``; saved scale and zero
            point, (..., groups, 1), float32
        """

    def rounding_speed(self, weight: Tensor, scale: Tensor) -> Tensor | float:
        """
        :param weight: (..., groups, group_size), any float dtype
        :param scale: `effective_scale`
        :return: factor of the sign step of each V, float32, the shape of ``weight``; or of all
        """
        return 1.0

    def effective_scale(self, scale: Tensor, global_scale: Tensor | None) -> Tensor:
        """:return: by what values are multiplied, (..., groups, 1)"""
        return scale if global_scale is None else scale / global_scale.unsqueeze(-1)


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest even; the gradient passes straight through."""
    return x + (x.round() - x).detach()


def cast_ste(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``x`` to the values of ``dtype``, keep its own dtype; straight-through gradient."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def scale_floor(dtype: torch.dtype) -> float:
    """:return: the smallest scale used, so that a group of zeros does not divide by zero"""
    return 2.0**-20 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal
