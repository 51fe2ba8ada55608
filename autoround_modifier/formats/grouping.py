"""How a weight is cut into the groups that share a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Grouping", "observed_range"]


@dataclass(frozen=True)
class Grouping:
    """
    Tiles of equal size; those at the lower and right edge are filled up with zeros.

    ``group`` and ``tensor_group`` cut rows into pieces, ``channel`` takes whole rows, ``tensor``
    everything, ``block`` rectangles.

    :param shape: (out_features, in_features)
    :param tile: rows and columns of one group
    :param scale_shape: as compressed-tensors stores the scale
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    scale_shape: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], args: QuantizationArgs) -> Grouping:
        rows, columns = shape
        match args.strategy:
            case QuantizationStrategy.TENSOR:
                return cls((rows, columns), (rows, columns), (1,))
            case QuantizationStrategy.CHANNEL:
                tile = (1, columns)
            case QuantizationStrategy.BLOCK:
                assert args.block_structure is not None
                tile = (args.block_structure[0], args.block_structure[1])
            case _:
                assert args.group_size is not None
                tile = (1, args.group_size)
        return cls((rows, columns), tile, (math.ceil(rows / tile[0]), math.ceil(columns / tile[1])))

    @property
    def group_size(self) -> int:
        return self.tile[0] * self.tile[1]

    @property
    def groups_across(self) -> int:
        """How many groups lie side by side."""
        return self.scale_shape[-1]

    def split(self, weight: Tensor) -> Tensor:
        """:return: (groups, group_size); a view where groups lie within rows"""
        height, width = self.tile
        rows, columns = self.shape
        if rows % height or columns % width:
            weight = F.pad(weight, (0, -columns % width, 0, -rows % height))
        if height == 1:
            return weight.reshape(-1, width)
        tiles = weight.unflatten(0, (-1, height)).unflatten(-1, (-1, width))
        return tiles.transpose(1, 2).reshape(-1, height * width)

    def join(self, groups: Tensor) -> Tensor:
        """The inverse of `split`: (groups, group_size) -> (out_features, in_features)."""
        height, width = self.tile
        rows, columns = self.shape
        if height == 1 and columns % width == 0:
            return groups.view(self.shape)
        tiles = groups.view(-1, self.groups_across, height, width).transpose(1, 2)
        return tiles.reshape(-1, self.groups_across * width)[:rows, :columns]

    def split_channels(self, channels: Tensor) -> Tensor:
        """
        :param channels: one number of each input channel, (in_features,)
        :return: those of the columns of each group, (groups_across, columns of a group)
        """
        width = self.tile[1]
        return F.pad(channels, (0, -self.shape[1] % width)).view(-1, width)


def observed_range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """
    :param groups: (..., group_size)
    :return: minimum and maximum of each group, zero included, (...), float32
    """
    return groups.amin(-1).float().clamp_(max=0), groups.amax(-1).float().clamp_(min=0)
