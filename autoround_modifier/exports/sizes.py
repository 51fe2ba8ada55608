"""How large an exported checkpoint is, from the shapes of its layers."""

from __future__ import annotations

from collections.abc import Sequence

from autoround_modifier.exports.export_formats import AUTO, FORMATS, GGUF, layer_problems
from autoround_modifier.exports.gguf_choice import TYPES
from autoround_modifier.exports.gguf_types import BLOCK_TYPES, BlockType
from autoround_modifier.exports.integer_specs import IntegerSpec
from autoround_modifier.exports.predicted import PredictedLayers

__all__ = ["exported_bytes"]

FLOAT16 = 2
FLOAT32 = 4
INDEX = 4  # bytes of a number in `g_idx`


def exported_bytes(name: str, layers: PredictedLayers) -> int:
    """
    Of scales in bfloat16.

    :param name: of a format that holds the layers
    :param layers: that will be saved
    :return: bytes of all tensors. Of GGUF without metadata, with the tensors that are not quantized
        as they are in the checkpoint
    """
    if not name.startswith(GGUF):
        return layers.others + sum(_layer_bytes(name, spec) for spec in layers.specs)
    kind = name.removeprefix(GGUF)
    order = TYPES if kind == AUTO else (BLOCK_TYPES[kind], *TYPES)
    size = layers.others
    for spec in layers.specs:
        size += _block_bytes(_first_that_holds(spec, order), spec.out_features, spec.in_features)
    for floats in layers.floats.values():
        size += _block_bytes(BLOCK_TYPES[floats.numbers], *floats.shape)
    return size


def _first_that_holds(spec: IntegerSpec, order: Sequence[BlockType]) -> BlockType:
    return next(
        kind for kind in order if not any(layer_problems(FORMATS[f"{GGUF}{kind.name}"], spec))
    )


def _block_bytes(kind: BlockType, rows: int, columns: int) -> int:
    return rows * columns // kind.block * kind.size


def _layer_bytes(name: str, spec: IntegerSpec) -> int:
    """:param name: of a format other than GGUF"""
    scales = spec.out_features * (spec.in_features // spec.features_per_scale)
    codes = spec.out_features * spec.in_features * spec.num_bits // 8
    if name == "mlx":  # scales and biases
        return codes + 2 * scales * (FLOAT16 if spec.symmetric else FLOAT32)
    zero_points = scales * spec.num_bits // 8
    index = INDEX * spec.in_features if name == "gptq" else 0
    return codes + zero_points + FLOAT16 * scales + index
