"""Several processes, each with a share of the calibration samples (``torchrun``)."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "gathered",
    "is_distributed",
    "is_source_process",
    "process_rank",
    "summed",
    "wait_for_all",
]

T = TypeVar("T")


def is_distributed() -> bool:
    """:return: whether several processes were started together"""
    return dist.is_available() and dist.is_initialized()


def is_source_process() -> bool:
    """:return: whether this process writes what all have in common"""
    return process_rank()[0] == 0


def process_rank() -> tuple[int, int]:
    """:return: the number of this process, and how many there are"""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def summed(tensor: Tensor) -> Tensor:
    """
    The sum over all processes, of the same shape and dtype in each; the same bits in all of them.

    :param tensor: this process's; left as it is
    """
    if not is_distributed():
        return tensor
    # Narrow floats are added up in float32, as a matrix product over all samples would.
    wide = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.clone()
    dist.all_reduce(wide)
    return wide.to(tensor.dtype)


def gathered(value: T) -> list[T]:
    """:return: the value of each process, in the order of their ranks; it must be picklable"""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def wait_for_all() -> None:
    """Return when every process has come here."""
    if is_distributed():
        dist.barrier()
