"""
Blocks of GGUF that hold integers of neighbouring input features and their scale. Values are a scale
times an integer, or that plus a minimum, so that integers and scales stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoround_modifier.exports.gguf_types import BLOCK_TYPES, BlockType, Bytes
from autoround_modifier.exports.integer_layers import IntegerLayer

__all__ = ["HAS_MINIMUM", "inexact_minima", "nibbles", "pack_integers"]


@dataclass(frozen=True)
class _Packer:
    """
    :ivar pack: makes the bytes of codes (rows, block), int16
    :ivar offset: code of a weight of 0, where the type has no minimum
    :ivar negated: whether scale and integers change their signs
    :ivar scale_last: whether the scale follows the codes
    """

    pack: Callable[[NDArray[np.int16]], Bytes]
    offset: int = 0
    negated: bool = False
    scale_last: bool = False


def _fours(codes: NDArray[np.int16]) -> Bytes:
    """Element j is in bits 2 (j mod 4) of byte j / 4."""
    return _two_bits(codes.astype(np.uint8).reshape(len(codes), -1, 4), axis=-1)


def _quarters(codes: NDArray[np.int16]) -> Bytes:
    """Of each half of 128, element 32 l + m is in bits 2 l of byte m."""
    packed = _two_bits(codes.astype(np.uint8).reshape(len(codes), 2, 4, 32), axis=2)
    return packed.reshape(len(codes), 64)


def _two_bits(codes: Bytes, axis: int) -> Bytes:
    """:param axis: of four, of which the first is in the lowest bits of a byte"""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)
    by_axis = shifts if axis == -1 else shifts[:, None]
    return np.bitwise_or.reduce(np.left_shift(codes, by_axis), axis=axis)


def nibbles(codes: NDArray[np.integer]) -> Bytes:
    """:return: (rows, n / 2), of (rows, n): the first half in the low bits"""
    half = codes.shape[1] // 2
    low, high = codes[:, :half].astype(np.uint8), codes[:, half:].astype(np.uint8)
    return np.bitwise_or(low, np.left_shift(high, np.uint8(4)))


def _with_fifth_bits(codes: NDArray[np.int16]) -> Bytes:
    """The fifth bits first, element j in bit j; then the other four."""
    fifth = np.packbits((codes >> 4).astype(np.uint8), axis=1, bitorder="little")
    return np.concatenate([fifth, nibbles(codes & 15)], axis=1)


def _bytes(codes: NDArray[np.int16]) -> Bytes:
    return codes.astype(np.int8).view(np.uint8)


_PACKERS = {
    "tq2_0": _Packer(_quarters, 1, negated=True, scale_last=True),
    "q2_0": _Packer(_fours, 1, negated=True),
    "q4_0": _Packer(nibbles, 8),
    "q4_1": _Packer(nibbles),
    "q5_0": _Packer(_with_fifth_bits, 16),
    "q5_1": _Packer(_with_fifth_bits),
    "q8_0": _Packer(_bytes),
}
# Types whose values are `scale * code + minimum`
HAS_MINIMUM = (BLOCK_TYPES["q4_1"], BLOCK_TYPES["q5_1"])


def _minima(layer: IntegerLayer) -> Tensor:
    """:return: (out_features, groups), float64: values of the code 0"""
    return -layer.scale.double() * layer.zero_point.double()


def inexact_minima(layer: IntegerLayer) -> float:
    """:return: share of groups whose minimum is not exact in float16"""
    exact = _minima(layer)
    return (exact.to(torch.float16).double() != exact).double().mean().item()


def pack_integers(layer: IntegerLayer, kind: BlockType) -> Bytes:
    """
    :param layer: that the type holds, with scales and, where it has them, minima that are exact in
        float16
    :param kind: type of the blocks; each lies in one group
    :return: (out_features, in_features / block * size)
    """
    spec, packer = layer.spec, _PACKERS[kind.name]
    codes = layer.codes.to(torch.int16)
    scale = layer.scale.double()
    floats = [scale]
    if kind in HAS_MINIMUM:
        floats.append(_minima(layer))
    else:
        zero_point = layer.zero_point.to(torch.int16)
        codes = codes - zero_point.repeat_interleave(spec.features_per_scale, 1)
        if packer.negated:
            codes, floats = -codes, [-scale]
        codes = codes + packer.offset
    packed = packer.pack(codes.reshape(-1, kind.block).numpy())
    repeats = spec.features_per_scale // kind.block
    columns = [_float16_bytes(x.repeat_interleave(repeats, 1)) for x in floats]
    parts = [packed, *columns] if packer.scale_last else [*columns, packed]
    return np.concatenate(parts, axis=1).reshape(spec.out_features, -1)


def _float16_bytes(numbers: Tensor) -> Bytes:
    """:return: (n, 2), little-endian float16, of n numbers"""
    found = numbers.to(torch.float16).contiguous().view(-1, 1).numpy()
    return found.astype("<f2").view(np.uint8)
