"""A weight as it is packed in a checkpoint, and how its integers are taken out again."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PackedSpec", "PackedWeight", "dequantize_rows", "unpack_rows"]

CHANNEL = -1
BYTE = 8


@dataclass(frozen=True)
class PackedSpec:
    """
    :param name: of the layer, as in the files
    :param out_features: rows of its weight
    :param in_features: columns of its weight
    :param num_bits: of an integer, 1 to 8
    :param symmetric: whether it has no zero points
    :param group_size: input features that share a scale; -1 where a whole row does
    """

    name: str
    out_features: int
    in_features: int
    num_bits: int
    symmetric: bool
    group_size: int

    @property
    def features_per_scale(self) -> int:
        return self.in_features if self.group_size == CHANNEL else self.group_size

    @property
    def label(self) -> str:
        """Such as ``2 bits, symmetric, groups of 64``."""
        groups = (
            "one scale per row" if self.group_size == CHANNEL else f"groups of {self.group_size}"
        )
        return f"{self.num_bits} bits, {'' if self.symmetric else 'a'}symmetric, {groups}"


@dataclass(frozen=True)
class PackedWeight:
    """
    ``weight = (integer - zero_point) * scale``, each scale and zero point for its group of columns.

    :param spec: how it is quantized
    :param packed: (out_features, words), int32: each row is one stream of bits, the lowest bits of
        a word first, of integers from 0 to ``2 ** num_bits - 1``
    :param scale: (out_features, groups), floating point; may be negative
    :param zero_point: (out_features, groups), int16, counted as integers are; None if symmetric,
        where it is ``2 ** (num_bits - 1)``
    """

    spec: PackedSpec
    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def to(self, device: torch.device) -> PackedWeight:
        """:return: the same on another device"""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return PackedWeight(self.spec, self.packed.to(device), self.scale.to(device), zero_point)

    def signed(self) -> Tensor:
        """:return: (out_features, in_features), int8: the integers less ``2 ** (num_bits - 1)``"""
        return unpack_rows(self.packed, self.spec.num_bits, self.spec.in_features)

    def signed_zero_point(self) -> Tensor:
        """:return: (out_features, groups), int8, less ``2 ** (num_bits - 1)``; zero if symmetric"""
        if self.zero_point is None:
            return torch.zeros(self.scale.shape, dtype=torch.int8, device=self.scale.device)
        return (self.zero_point - 2 ** (self.spec.num_bits - 1)).to(torch.int8)


def unpack_rows(packed: Tensor, num_bits: int, columns: int) -> Tensor:
    """
    :param packed: (rows, words), int32, as in `PackedWeight`
    :param num_bits: of an integer, 1 to 8
    :param columns: integers in a row
    :return: (rows, columns), int8: the integers less ``2 ** (num_bits - 1)``
    """
    stream = packed.contiguous().view(torch.uint8)
    if num_bits == BYTE:
        signed = (stream ^ 0x80).view(torch.int8)
    elif BYTE % num_bits == 0:
        table = _table(num_bits, str(packed.device))
        signed = table.index_select(0, stream.reshape(-1).int()).view(torch.int8)
    else:
        signed = _unpack_stream(stream, num_bits)
    return signed.view(packed.shape[0], -1)[:, :columns]


def dequantize_rows(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int, columns: int
) -> Tensor:
    """
    As compressed-tensors does, in the dtype of the scales.

    :param packed: (rows, words), int32; the other parameters are those of `PackedWeight`
    :param columns: integers in a row
    :return: (rows, columns), in the dtype of the scales
    """
    rows, groups = scale.shape
    signed = unpack_rows(packed, num_bits, columns)
    weight = signed.reshape(rows, groups, -1).to(scale.dtype)
    if zero_point is not None:
        weight.sub_((zero_point - 2 ** (num_bits - 1)).to(scale.dtype).unsqueeze(-1))
    return weight.mul_(scale.unsqueeze(-1)).view(rows, columns)


@functools.cache
def _table(num_bits: int, device: str) -> Tensor:
    """:return: (256,): of each byte its 8 / ``num_bits`` signed integers, as one number"""
    count = BYTE // num_bits
    bytes_ = torch.arange(256, device=device)
    integers = [(bytes_ >> (num_bits * i)) & (2**num_bits - 1) for i in range(count)]
    signed = (torch.stack(integers, dim=-1) - 2 ** (num_bits - 1)).to(torch.int8)
    wide = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[count]
    return signed.contiguous().view(wide).view(-1)


def _unpack_stream(stream: Tensor, num_bits: int) -> Tensor:
    """
    Eight integers fill ``num_bits`` bytes, whatever the number of bits; a row of whole words is not
    always a multiple of that.

    :param stream: (rows, bytes), uint8
    :return: (rows, integers), int8
    """
    rows, size = stream.shape
    padded = -(-size // num_bits) * num_bits
    if padded != size:
        stream = torch.nn.functional.pad(stream, (0, padded - size))
    stream = stream.view(rows, -1, num_bits)
    result = torch.empty(*stream.shape[:2], BYTE, dtype=torch.uint8, device=stream.device)
    for place in range(BYTE):
        byte, shift = divmod(place * num_bits, BYTE)
        integer = stream[..., byte] >> shift
        if shift + num_bits > BYTE:
            integer = integer | (stream[..., byte + 1] << (BYTE - shift))
        result[..., place] = (integer & (2**num_bits - 1)) - 2 ** (num_bits - 1)
    return result.view(torch.int8).view(rows, -1)
