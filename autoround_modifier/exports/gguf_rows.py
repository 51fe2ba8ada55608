"""
Finds the order in which llama.cpp's converter puts the rows of a weight: that of Llama, for one,
interleaves the halves of each head of queries and keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["row_order"]


def row_order(weight: Tensor, converted: NDArray[Any]) -> NDArray[np.int64] | None:
    """
    :param weight: (rows, columns), as in the checkpoint
    :param converted: the same weight in the converter's file, of the same dtype
    :return: for each row in the file, its number in the checkpoint; None if rows differ
    """
    ours = [row.tobytes() for row in weight.contiguous().view(torch.uint8).numpy()]
    theirs = [row.tobytes() for row in converted]
    places: dict[bytes, list[int]] = {}
    for number, row in enumerate(ours):
        places.setdefault(row, []).append(number)
    for numbers in places.values():
        numbers.reverse()
    order = [places[row].pop() for row in theirs if places.get(row)]
    return np.array(order) if len(order) == len(theirs) == len(ours) else None
