"""
Packs weights that were tuned as K-quants into the blocks of llama.cpp, bit for bit.

The layouts are those of ``block_q*_K`` in ggml-common.h. Each function takes the parts of a
`SuperBlockGrid`, cut into super-blocks: ``values``, (super-blocks, 256); ``scales`` and ``mins``,
(super-blocks, sub-blocks of each); ``d`` and ``dmin``, (super-blocks,), float16. It returns the
bytes of each super-block, (super-blocks, size), uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autoround_modifier.exports.gguf_blocks import pack_integers
from autoround_modifier.exports.gguf_types import BLOCK_TYPES
from autoround_modifier.exports.integer_layers import IntegerLayer, IntegerSpec
from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.formats.super_block import SUPER_BLOCK
from autoround_modifier.gguf_schemes import GGUF_TYPES

__all__ = ["SUPER_BLOCK_BYTES", "pack_super_blocks", "pack_weight"]

Parts = Mapping[str, Tensor]


def pack_weight(weight: QuantizedWeight, kind: str) -> Tensor:
    """
    :param weight: on any device, with the grid of `formats.gguf_specs.GGUF_SPECS`
    :param kind: name of its type
    :return: (out_features, bytes of a row), uint8, on the CPU
    """
    if kind in SUPER_BLOCK_BYTES:
        return pack_super_blocks(weight.parts, kind)
    values, scale = weight.values.cpu(), weight.scale.cpu()
    rows, columns = values.shape
    bits = GGUF_TYPES[kind].num_bits
    offset = 2 ** (bits - 1)
    layer = IntegerLayer(
        IntegerSpec("", rows, columns, bits, True, weight.grouping.group_size, "linear"),
        (values.to(torch.int16) + offset).to(torch.uint8),
        scale,
        torch.full(scale.shape, offset, dtype=torch.uint8),
    )
    return torch.from_numpy(pack_integers(layer, BLOCK_TYPES[kind]))


def pack_super_blocks(parts: Parts, kind: str) -> Tensor:
    """
    :param parts: of a `QuantizedWeight` with a `SuperBlockGrid`, on any device
    :param kind: name of its type, a key of `SUPER_BLOCK_BYTES`
    :return: (out_features, bytes of a row), uint8, on the CPU
    """
    rows = len(parts["values"])
    cut = {name: part.cpu() for name, part in parts.items()}
    cut["values"] = cut["values"].reshape(-1, SUPER_BLOCK)
    return _PACKERS[kind](cut).reshape(rows, -1)


def _q2_k(parts: Parts) -> Tensor:
    scales = parts["scales"] | parts["mins"] << 4
    return torch.cat([scales, _pairs(parts["values"]), *_units(parts)], 1)


def _q3_k(parts: Parts) -> Tensor:
    codes = (parts["values"] + 4).to(torch.uint8)
    high, low = _high_bits(codes >> 2), _pairs(codes & 3)
    return torch.cat([high, low, _signed_scales(parts["scales"]), *_units(parts)], 1)


def _q4_k(parts: Parts) -> Tensor:
    scales = _scales_and_mins(parts["scales"], parts["mins"])
    return torch.cat([*_units(parts), scales, _nibbles(parts["values"], 32)], 1)


def _q5_k(parts: Parts) -> Tensor:
    scales, codes = _scales_and_mins(parts["scales"], parts["mins"]), parts["values"]
    high, low = _high_bits(codes >> 4), _nibbles(codes & 15, 32)
    return torch.cat([*_units(parts), scales, high, low], 1)


def _q6_k(parts: Parts) -> Tensor:
    codes = (parts["values"] + 32).to(torch.uint8)
    scales = parts["scales"].view(torch.uint8)
    return torch.cat([_nibbles(codes & 15, 64), _pairs(codes >> 4), scales, *_units(parts)], 1)


def _units(parts: Parts) -> list[Tensor]:
    """:return: the bytes of ``d``, and of ``dmin`` if there is one, each (super-blocks, 2)"""
    units = [parts[name] for name in ("d", "dmin") if name in parts]
    return [unit.contiguous().unsqueeze(1).view(torch.uint8) for unit in units]


def _pairs(codes: Tensor) -> Tensor:
    """:return: (super-blocks, 64): element 128 h + 32 l + m in bits 2 l of byte 32 h + m"""
    quarters = codes.unflatten(1, (2, 4, 32))
    return _joined([quarters[:, :, part] << 2 * part for part in range(4)]).flatten(1)


def _nibbles(codes: Tensor, width: int) -> Tensor:
    """:return: (super-blocks, 128): ``width`` elements in the low bits, the next in the high"""
    halves = codes.unflatten(1, (-1, 2, width))
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def _high_bits(bits: Tensor) -> Tensor:
    """:return: (super-blocks, 32): element 32 b + m in bit b of byte m"""
    eighths = bits.unflatten(1, (8, 32))
    return _joined([eighths[:, part] << part for part in range(8)])


def _signed_scales(scales: Tensor) -> Tensor:
    """
    :param scales: (super-blocks, 16), -32 to 31
    :return: (super-blocks, 12): of ``sc + 32`` the low 4 bits of sub-blocks j and j + 8 in byte j,
        and the high 2 bits of sub-block 4 i + c in bits 2 i of byte 8 + c
    """
    codes = (scales + 32).to(torch.uint8)
    low = codes[:, :8] & 15 | (codes[:, 8:] & 15) << 4
    fours = (codes >> 4).unflatten(1, (4, 4))
    return torch.cat([low, _joined([fours[:, part] << 2 * part for part in range(4)])], 1)


def _scales_and_mins(scales: Tensor, mins: Tensor) -> Tensor:
    """
    :param scales: (super-blocks, 8), 0 to 63
    :param mins: the same
    :return: (super-blocks, 12): bytes 0 to 3 and 4 to 7 have the first four scales and minima,
        above them the high 2 bits of the last four, whose low 4 bits are in bytes 8 to 11
    """
    first = [x[:, :4] | x[:, 4:] >> 4 << 6 for x in (scales, mins)]
    return torch.cat([*first, scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4], 1)


def _joined(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total | term
    return total


_PACKERS: dict[str, Callable[[Parts], Tensor]] = {
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
# Types whose values are a float16 scale times an integer
# Bytes of a super-block
SUPER_BLOCK_BYTES = {kind: BLOCK_TYPES[kind].size for kind in _PACKERS}
