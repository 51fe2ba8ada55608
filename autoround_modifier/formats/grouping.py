"""How a weight is cut into the groups that share a scale."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

__all__ = ["Grouping", "observed_range"]


@dataclass(frozen=True)
class Grouping:
    """
    Tiles of equal size; those at the lower and right edge are filled up with zeros.

    A tile is a piece of a row, a whole row, a rectangle, or the whole weight (`WeightSpec`).

    :param shape: (out_features, in_features)
    :param tile: rows and columns of one group
    :param scale_shape: as compressed-tensors stores the scale
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    scale_shape: tuple[int, ...]

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
