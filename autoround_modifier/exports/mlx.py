"""The affine format of MLX: tensors of a layer, and the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autoround_modifier.exports.bit_stream import pack_rows
from autoround_modifier.exports.integer_layers import IntegerLayer, IntegerSpec
from autoround_modifier.exports.layer_names import most_common_scheme

__all__ = ["mlx_config", "mlx_fields", "mlx_notes", "mlx_tensors"]


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


def mlx_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    What Transformers 5 keeps in ``rope_parameters`` and ``layer_types``, under the names of older
    releases: most models of mlx-lm 0.32 know no others, and take their defaults instead.

    :param config: ``config.json``
    :return: the same, with these fields where it lacks them
    """
    found = dict(config)
    if isinstance(config.get("text_config"), dict):
        found["text_config"] = mlx_fields(config["text_config"])
    for name, value in _older_fields(config).items():
        if found.get(name) is None:
            found[name] = value
    return found


def _older_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    parameters = config.get("rope_parameters") or {}
    found: dict[str, Any] = {}
    if any(isinstance(value, dict) for value in parameters.values()):  # by the type of a layer
        local, parameters = (
            parameters.get(kind) or {} for kind in ("sliding_attention", "full_attention")
        )
        if "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
    own = ("rope_theta", "partial_rotary_factor")
    found |= {name: parameters[name] for name in own if name in parameters}
    scaling = {name: value for name, value in parameters.items() if name not in own}
    if scaling.get("rope_type", "default") != "default":
        found["rope_scaling"] = scaling
    layer_types = config.get("layer_types") or []
    if "full_attention" in layer_types and "sliding_attention" in layer_types:
        found["sliding_window_pattern"] = layer_types.index("full_attention") + 1
    return found


def mlx_notes(specs: Sequence[IntegerSpec]) -> list[str]:
    """:return: what a user should know of the exported checkpoint"""
    if all(spec.symmetric for spec in specs):
        return []
    return [
        "scales and biases of weights with zero points are float32, since bfloat16 would round "
        "them; MLX then computes in float32"
    ]
