"""The format of AWQ, version GEMM: tensors of a layer, and the config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoround_modifier.exports.integer_layers import IntegerLayer, IntegerSpec
from autoround_modifier.exports.layer_names import with_fused

__all__ = ["awq_config", "awq_tensors", "misread_names"]

# Which of eight neighbouring output channels is in each nibble of a word, the lowest first
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_tensors(layer: IntegerLayer) -> dict[str, Tensor]:
    """
    :param layer: of 4 bits, with output features that are a multiple of 8
    :return: ``qweight``, (in_features, out_features / 8), and ``qzeros``, (groups, out_features /
        8), int32, packed along the output features; ``scales``, (groups, out_features), float16
    """
    return {
        "qweight": _packed(layer.codes.T),
        "qzeros": _packed(layer.zero_point.T),
        "scales": layer.scale.to(torch.float16).T.contiguous(),
    }


def _packed(codes: Tensor) -> Tensor:
    """:return: (rows, columns / 8), int32"""
    eights = codes.to(torch.int64).reshape(codes.shape[0], -1, len(ORDER))
    words = torch.zeros(eights.shape[:2], dtype=torch.int64)
    for nibble, channel in enumerate(ORDER):
        words |= eights[..., channel] << (4 * nibble)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def awq_config(specs: Sequence[IntegerSpec], skipped: Sequence[str]) -> dict[str, Any]:
    """
    Zero points are in the files of symmetric weights as well (8): without ``zero_point: true`` vLLM
    chooses slower kernels, or none.

    :param specs: of the quantized layers, all of one group size
    :param skipped: layers that are not quantized
    :return: ``quantization_config`` of ``config.json``
    """
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": specs[0].group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _not_converted(skipped),
    }


def misread_names(names: Sequence[str], skipped: Sequence[str]) -> list[str]:
    """:return: quantized layers that loaders would skip, because the name of one that is not
    quantized is a part of theirs"""
    parts = _not_converted(skipped)
    return [name for name in names if any(part in name for part in parts)]


def _not_converted(skipped: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(["lm_head", *with_fused(skipped)]))
