"""
Embeddings and head of a GGUF file, rounded: they are not tuned, and are a large part of a small
model. Types of 8 and 6 bits, whose rounding costs less than the 8-bit activations of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoround_modifier.engines.layout import TensorLayout
from autoround_modifier.errors import ExportError
from autoround_modifier.exports.gguf_types import BLOCK_TYPES, BlockType, Bytes
from autoround_modifier.exports.integer_layers import kind_of
from autoround_modifier.readable import bytes_text

__all__ = ["EMBEDDINGS", "Rounding", "round_q6_k", "rounding_notes"]

Floats = NDArray[np.floating[Any]]

# Names in GGUF; tied embeddings are one tensor
TENSORS = ("token_embd.weight", "output.weight")
F16, BF16 = BlockType("f16", 1, 1, 1, 2), BlockType("bf16", 30, 32, 1, 2)
EMBEDDINGS: dict[str, BlockType] = {
    "f16": F16,
    "bf16": BF16,
    "q8_0": BLOCK_TYPES["q8_0"],
    "q6_k": BLOCK_TYPES["q6_k"],
}
# Numbers that are rounded at once
CHUNK = 2**24
# Of a file, from which on embeddings in 16 bits are worth a note
LARGE_SHARE = 0.2


@dataclass(frozen=True)
class Rounding:
    """
    :param name: of the type of embeddings and head: ``f16``, ``bf16``, ``q8_0`` or ``q6_k``. Rows
        that are no multiple of its block get Q8_0, or else stay
    :raises ExportError: if there is no such type
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in EMBEDDINGS:
            raise ExportError(
                f"embeddings cannot be rounded to `{self.name}`; use one of {', '.join(EMBEDDINGS)}"
            )

    def kind(self, tensor: Any) -> BlockType | None:
        """
        :param tensor: of the converter's file
        :return: the type to which it is rounded; None if it stays as it is
        """
        if tensor.name not in TENSORS:
            return None
        columns = int(tensor.shape[0])
        kinds = (EMBEDDINGS[self.name], BLOCK_TYPES["q8_0"])
        return next((kind for kind in kinds if columns % kind.block == 0), None)

    def round(self, tensor: Any) -> Bytes:
        """
        :param tensor: see `kind`
        :return: (rows, columns / block * size)
        """
        import gguf

        kind = self.kind(tensor)
        assert kind is not None
        step = max(1, CHUNK // int(tensor.shape[0]))
        result = []
        for start in range(0, len(tensor.data), step):
            rows = gguf.quants.dequantize(tensor.data[start : start + step], tensor.tensor_type)
            result.append(
                round_q6_k(rows)
                if kind.name == "q6_k"
                else gguf.quants.quantize(rows, gguf.GGMLQuantizationType(kind.number))
            )
        made = np.concatenate(result)
        return made.view(np.uint8)


def round_q6_k(weight: Floats) -> Bytes:
    """
    Plain rounding. Of each 16 numbers the one of the largest magnitude becomes -32 times their
    scale, and of each 16 scales the largest becomes -128 times that of the block.

    :param weight: (rows, columns)
    :return: (rows, columns / 256 * 210)
    """
    numbers = weight.reshape(-1, 16, 16)
    scale = _largest(numbers) / np.float32(-32)
    block_scale = (_largest(scale) / np.float32(-128)).astype(np.float16)
    wide = block_scale.astype(np.float32)[:, None]
    steps = np.clip(np.round(_divided(scale, wide)), -128, 127).astype(np.int8)
    rounded = np.round(_divided(numbers, (wide * steps)[..., None]))
    codes = (np.clip(rounded, -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    # Of each half of 128: numbers 0 to 63 in the low bits of 64 bytes, 64 to 127 in the high ones;
    # the upper two bits of numbers m, m + 32, m + 64 and m + 96 in byte m
    low = np.bitwise_and(codes, np.uint8(15))
    fours = low[:, :, :2] | np.left_shift(low[:, :, 2:], np.uint8(4))
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    twos = np.bitwise_or.reduce(np.left_shift(np.right_shift(codes, np.uint8(4)), shifts), axis=2)
    parts = [
        fours.reshape(-1, 128),
        twos.reshape(-1, 64),
        steps.view(np.uint8),
        block_scale.astype("<f2").view(np.uint8).reshape(-1, 2),
    ]
    return np.concatenate(parts, axis=1).reshape(len(weight), -1)


def _largest(numbers: Floats) -> Floats:
    """:return: along the last axis, with its sign"""
    places = np.abs(numbers).argmax(axis=-1)[..., None]
    return np.take_along_axis(numbers, places, axis=-1)[..., 0]


def _divided(numbers: Floats, by: Floats) -> Floats:
    """:return: 0 where it would be divided by 0"""
    there = np.asarray(by != 0)
    return np.divide(numbers, by, out=np.zeros_like(numbers), where=there)


def rounding_notes(
    tensors: Mapping[str, TensorLayout],
    quantized: Container[str],
    rounding: Rounding | None,
    size: int,
) -> Iterator[str]:
    """
    Yield what a user should know of embeddings and head.

    :param tensors: of the checkpoint
    :param quantized: names of layers
    :param size: bytes of the file
    """
    matrices = [
        tensor
        for name, tensor in tensors.items()
        if name.endswith(".weight")
        and len(tensor.shape) == 2
        and kind_of(name.removesuffix(".weight")) in ("embedding", "head")
        and name.removesuffix(".weight") not in quantized
    ]
    if rounding is None:
        kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in matrices)
        if kept > size * LARGE_SHARE:
            yield (
                f"embeddings and head, which are not quantized, take {bytes_text(kept)} of "
                f"{bytes_text(size)}; `--embeddings q8_0` rounds them to 8 bits"
            )
        return
    columns = {x.shape[1] for x in matrices if x.shape[1] % EMBEDDINGS[rounding.name].block}
    for width in sorted(columns):
        yield f"{rounding.name} holds no rows of {width}: such embeddings and heads are in q8_0"
