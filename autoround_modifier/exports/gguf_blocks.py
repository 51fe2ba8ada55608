"""
Blocks of GGUF that hold integers of neighbouring input features and their scale. Values are a scale
times an integer, so that integers and scales stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from autoround_modifier.exports.gguf_types import BLOCK_TYPES, BlockType, Bytes
from autoround_modifier.exports.integer_layers import IntegerLayer

__all__ = ["pack_integers"]


@dataclass(frozen=True)
class _Packer:
    """
    :ivar negated: whether scale and integers change their signs
    :ivar pack: makes the bytes after the scale, (rows, size - 2), of integers (rows, block), int16
    """

    negated: bool
    pack: Callable[[NDArray[np.int16]], Bytes]


def _q2_0(values: NDArray[np.int16]) -> Bytes:
    """Element j is in bits 2 (j mod 4) of byte j / 4, plus one."""
    fours = (values + 1).astype(np.uint8).reshape(len(values), -1, 4)
    shifted = np.left_shift(fours, np.array([0, 2, 4, 6], dtype=np.uint8))
    return np.bitwise_or.reduce(shifted, axis=-1)


def _q4_0(values: NDArray[np.int16]) -> Bytes:
    """Elements j and j + 16 are in byte j, plus eight."""
    codes = (values + 8).astype(np.uint8)
    return _nibbles(codes)


def _q5_0(values: NDArray[np.int16]) -> Bytes:
    """The fifth bits first, element j in bit j; then as in Q4_0. Plus sixteen."""
    codes = (values + 16).astype(np.uint8)
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")
    return np.concatenate([fifth, _nibbles(np.bitwise_and(codes, np.uint8(15)))], axis=1)


def _nibbles(codes: Bytes) -> Bytes:
    """:return: (rows, 16), of (rows, 32): the first half in the low bits"""
    high = np.left_shift(codes[:, 16:], np.uint8(4))
    return np.bitwise_or(codes[:, :16], high)


def _q8_0(values: NDArray[np.int16]) -> Bytes:
    return values.astype(np.int8).view(np.uint8)


_PACKERS = {
    BLOCK_TYPES["q2_0"]: _Packer(True, _q2_0),
    BLOCK_TYPES["q4_0"]: _Packer(False, _q4_0),
    BLOCK_TYPES["q5_0"]: _Packer(False, _q5_0),
    BLOCK_TYPES["q8_0"]: _Packer(False, _q8_0),
}


def pack_integers(layer: IntegerLayer, kind: BlockType) -> Bytes:
    """
    :param layer: that the type holds, with scales that are exact in float16
    :param kind: type of the blocks; each lies in one group
    :return: (out_features, in_features / block * size)
    """
    spec, packer = layer.spec, _PACKERS[kind]
    values = layer.codes.to(torch.int16) - layer.zero_point.to(torch.int16).repeat_interleave(
        spec.features_per_scale, 1
    )
    scale = layer.scale.to(torch.float16).repeat_interleave(
        spec.features_per_scale // kind.block, 1
    )
    if packer.negated:
        values, scale = -values, -scale
    packed = packer.pack(values.reshape(-1, kind.block).numpy())
    scales = scale.contiguous().view(-1, 1).numpy().astype("<f2").view(np.uint8)
    return np.concatenate([scales, packed], axis=1).reshape(spec.out_features, -1)
