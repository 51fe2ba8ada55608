"""Calibration batches of one shape, joined so that the model runs on several at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autoround_modifier.blocks.samples import stackable

__all__ = ["stacks"]

Inputs = dict[str, Any]


def stacks(
    inputs: Sequence[Inputs], kind: Callable[[int], Any] = lambda index: None
) -> Iterator[tuple[list[int], Inputs]]:
    """
    Yield which batches can be joined, and their joined arguments, in order of first appearance.

    :param inputs: of each batch, arguments of the model's forward
    :param kind: of a batch by its index; only batches of one kind are joined
    """

    def signature(index: int) -> tuple:
        shapes = _shapes(inputs[index])
        return (index,) if shapes is None else (kind(index), *shapes)

    for indices in stackable(list(range(len(inputs))), signature):
        group = [inputs[index] for index in indices]
        if len(group) == 1:
            yield indices, group[0]
        else:
            yield indices, {key: torch.cat([one[key] for one in group]) for key in group[0]}


def _shapes(inputs: Inputs) -> tuple | None:
    """:return: what batches must share to be joined; None if they cannot be"""
    tensors = inputs.values()
    if any(not isinstance(x, Tensor) or x.ndim < 2 for x in tensors):
        return None
    if len({len(x) for x in tensors}) > 1:
        return None  # a tensor whose first dimension is not the batch, such as image patches
    return tuple((key, x.shape, x.dtype) for key, x in sorted(inputs.items()))
