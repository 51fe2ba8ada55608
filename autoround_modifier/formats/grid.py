"""What a numeric format defines: the values that the weights of one group can take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoround_modifier.formats.grouping import Grouping

__all__ = ["Grid", "ScaledGrid", "cast_ste", "round_ste", "scale_floor"]


@dataclass(frozen=True)
class Grid(ABC):
    """
    How groups are quantized; hashable, so that a compiled function can depend on it.

    Groups that lie side by side in the weight are always handed over together, so that a grid may
    let some of them share a scale of their scales (super-blocks).

    The state of the groups is the same for all formats: weights (..., groups, group_size) in any
    float dtype; the ends of each group's range, ``w_min`` <= 0 and ``w_max`` >= 0, (..., groups),
    float32; the global scale of the weight repeated for each group, (..., groups), or None where
    the format has none; V, the shape of the weights, or None for rounding to nearest; alpha and
    beta, factors of ``w_min`` and ``w_max``, or None.

    :param dtype: of the weight, and of the dequantized weight
    :param scale_dtype: in which scales are saved
    :cvar tune_clipping: whether alpha and beta are learned by default
    """

    dtype: torch.dtype
    scale_dtype: torch.dtype
    tune_clipping: ClassVar[bool]

    @abstractmethod
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
        """
        Quantize and dequantize, differentiable in V, alpha and beta.

        :return: the dequantized weight, float32, the shape of ``weight``; and the distance of
            neighbouring values at 1, (..., groups, 1), float32
        """

    @abstractmethod
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
        :return: what is saved, by name: ``values`` of the shape of ``weight``; of every other part
            the first dimension are the groups, or super-blocks of them, in order. `ScaledGrid` has
            the parts that `QuantizedWeight` describes, another grid its own
        """

    @abstractmethod
    def dequantize(self, parts: dict[str, Tensor], grouping: Grouping) -> Tensor:
        """
        :param parts: of a whole weight, as in `QuantizedWeight`
        :return: (out_features, in_features), `dtype`
        """

    def rounding_speed(self, weight: Tensor, scale: Tensor) -> Tensor | float:
        """
        :param weight: (..., groups, group_size), any float dtype
        :param scale: the distance that `fake_quantize` returns
        :return: factor of the sign step of each V, float32, the shape of ``weight``; or of all
        """
        return 1.0


@dataclass(frozen=True)
class ScaledGrid(Grid):
    """
    Values less a zero point, times a scale: all formats of compressed-tensors.

    :cvar code_dtype: holds every value before it is scaled
    """

    code_dtype: ClassVar[torch.dtype]

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
        Parameters as in `Grid`; differentiable in V, alpha and beta.

        :return: values less the zero point, float32, the shape of ``weight``; saved scale and zero
            point, (..., groups, 1), float32
        """

    def effective_scale(self, scale: Tensor, global_scale: Tensor | None) -> Tensor:
        """:return: by what values are multiplied, (..., groups, 1)"""
        return scale if global_scale is None else scale / global_scale.unsqueeze(-1)

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
        steps, scale, _ = self.quantize(weight, w_min, w_max, global_scale, rounding, alpha, beta)
        scale = self.effective_scale(scale, global_scale)
        return steps * scale, scale

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
        steps, scale, zero_point = self.quantize(
            weight, w_min, w_max, global_scale, rounding, alpha, beta
        )
        return {
            "values": (steps + zero_point).to(self.code_dtype),
            "scale": scale.to(self.scale_dtype),
            "zero_point": zero_point.to(torch.int8),
        }

    def dequantize(self, parts: dict[str, Tensor], grouping: Grouping) -> Tensor:
        """``(q - z) * s``, with the scale over the global one if there is one."""
        scale = parts["scale"].float().view(-1, 1)
        if "global_scale" in parts:
            scale = scale / parts["global_scale"]
        zero_point = parts["zero_point"].view(-1, 1)
        steps = grouping.split(parts["values"]).float() - zero_point
        return grouping.join(steps.mul_(scale).to(self.dtype))


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest even; the gradient passes straight through."""
    return x + (x.round() - x).detach()


def cast_ste(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``x`` to the values of ``dtype``, keep its own dtype; straight-through gradient."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def scale_floor(dtype: torch.dtype) -> float:
    """:return: the smallest scale used, so that a group of zeros does not divide by zero"""
    return 2.0**-20 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal
