"""One quantized weight as it is saved."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from autoround_modifier.formats.grid import Grid
from autoround_modifier.formats.grouping import Grouping

__all__ = ["QuantizedWeight"]


@dataclass
class QuantizedWeight:
    """
    :param parts: by name, as the grid defines them. Those of compressed-tensors' formats:
        ``values``, (out_features, in_features): integers as int8, floating-point numbers as
        float8_e4m3fn, of which those of E2M1 are some;
        ``scale``, of the shape that compressed-tensors stores (`Grouping.scale_shape`);
        ``zero_point``, of the same shape, int8; zeros if symmetric;
        ``global_scale``, (1,), float32, by which all scales are divided; only for NVFP4.
        Another format has ``values`` and whatever else it needs
    :param grid: what the values mean
    :param grouping: which weights share a scale
    """

    parts: dict[str, Tensor]
    grid: Grid
    grouping: Grouping

    @property
    def values(self) -> Tensor:
        return self.parts["values"]

    @property
    def scale(self) -> Tensor:
        return self.parts["scale"]

    @property
    def zero_point(self) -> Tensor:
        return self.parts["zero_point"]

    @property
    def global_scale(self) -> Tensor | None:
        return self.parts.get("global_scale")

    def dequantize(self) -> Tensor:
        """:return: (out_features, in_features), in the grid's dtype"""
        return self.grid.dequantize(self.parts, self.grouping)
