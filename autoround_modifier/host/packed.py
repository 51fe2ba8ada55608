"""Unpacks what compressed-tensors packs."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor

__all__ = ["unpack_e2m1", "unpack_integers"]


def unpack_integers(packed: Tensor, num_bits: int, shape: tuple[int, ...], dim: int = 1) -> Tensor:
    """
    :param packed: int32, with several integers in each number along ``dim``
    :param num_bits: of one integer, 1 to 8
    :param shape: of the result
    :return: signed integers, int8
    """
    return unpack_from_int32(packed, num_bits, torch.Size(shape), packed_dim=dim)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """
    :param packed: (rows, columns / 2), uint8, two E2M1 numbers in each, the first in the low bits
    :return: (rows, columns), float32
    """
    rows, columns = packed.shape
    return unpack_fp4_from_uint8(packed, rows, 2 * columns, dtype=torch.float32)
