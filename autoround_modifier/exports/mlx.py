"""The affine format of MLX: tensors of a layer, and the config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoround_modifier.exports.bit_stream import pack_rows
from autoround_modifier.exports.integer_layers import IntegerLayer, IntegerSpec
from autoround_modifier.exports.layer_names import most_common_scheme

__all__ = ["mlx_config", "mlx_notes", "mlx_tensors"]


def mlx_tensors(layer: IntegerLayer) -> dict[str, Tensor]:
    """
    MLX computes ``scales * codes + biases``. The bias ``-scale * zero_point`` of a symmetric weight
    is the scale times a power of two; others have more digits than bfloat16, and are float32.

    :param layer: with groups of 32, 64 or 128
    :return: ``weight``, (out_features, in_features * num_bits / 32), uint32, packed along the input
        features; ``scales`` and ``biases``, (out_features, groups), in the dtype of the scale if
        symmetric, else float32
    """
    dtype = layer.scale.dtype if layer.spec.symmetric else torch.float32
    scale = layer.scale.to(dtype)
    return {
        "weight": pack_rows(layer.codes, layer.spec.num_bits).view(torch.uint32),
        "scales": scale.contiguous(),
        "biases": (-scale * layer.zero_point.to(dtype)).contiguous(),
    }


def mlx_config(specs: Sequence[IntegerSpec]) -> dict[str, Any]:
    """
    :param specs: of the quantized layers; all others are recognised by having no scales
    :return: ``quantization`` of ``config.json``; layers of other bits or groups are in it by name
    """
    bits, group_size = most_common_scheme(specs)
    others: dict[str, Any] = {
        spec.name: {"bits": spec.num_bits, "group_size": spec.group_size, "mode": "affine"}
        for spec in specs
        if (spec.num_bits, spec.group_size) != (bits, group_size)
    }
    return {"bits": bits, "group_size": group_size, "mode": "affine", **others}


def mlx_notes(specs: Sequence[IntegerSpec]) -> list[str]:
    """:return: what a user should know of the exported checkpoint"""
    if all(spec.symmetric for spec in specs):
        return []
    return [
        "scales and biases of weights with zero points are float32, since bfloat16 would round "
        "them; MLX then computes in float32"
    ]
