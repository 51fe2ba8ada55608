"""Weights released in FP8 with one scale for each block, as DeepSeek-V3 and Qwen3-FP8 are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dequantize_fp8_blocks", "has_blocks"]

E8M0_BIAS = 127


def has_blocks(stored: Tensor, scale: Tensor, block: Sequence[int]) -> bool:
    """:return: whether there is one scale for each block of the weight"""
    rows, columns = stored.shape[-2:]
    return tuple(scale.shape[-2:]) == (-(-rows // block[0]), -(-columns // block[1]))


def dequantize_fp8_blocks(stored: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    """
    Blocks at the lower and right edge are smaller where the block does not divide the shape, as in
    the 576 rows of DeepSeek-V3's ``kv_a_proj_with_mqa`` (section 3.3.2 of arXiv:2412.19437).

    :param stored: (..., rows, columns), E4M3, or its numbers in another dtype
    :param scale: (..., rows / block[0], columns / block[1]), rounded up: ``weight_scale_inv``, by
        which the stored numbers are multiplied. uint8 is an exponent (E8M0)
    :param block: rows and columns that share a scale
    :return: (..., rows, columns), float32
    :raises ValueError: if the scales are not as many as the blocks
    """
    if not has_blocks(stored, scale, block):
        raise ValueError(
            f"a weight of shape {tuple(stored.shape)} in blocks of {tuple(block)} cannot have "
            f"scales of shape {tuple(scale.shape)}"
        )
    rows, columns = stored.shape[-2:]
    is_exponent = scale.dtype == torch.uint8
    factors = torch.exp2(scale.float() - E8M0_BIAS) if is_exponent else scale.float()
    factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
    return stored.float() * factors.repeat_interleave(block[1], -1)[..., :columns]
