"""Bits of a layer as saved: packed values, scales, zero points, and all other tensors of it."""

from __future__ import annotations

import functools

import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.initialize import (
    initialize_module_for_quantization,
)
from torch import nn

from autoround_modifier.host.layers import Layer, stored_weight
from autoround_modifier.host.saved_format import choose_saved_format

__all__ = ["saved_bits", "saved_bits_of_shape"]


def saved_bits(layer: Layer, scheme: QuantizationScheme) -> int:
    """
    The size that compressed-tensors gives a layer of this shape, without its bias, which no scheme
    changes.

    :param scheme: one without ``weights`` leaves the layer as it is
    :return: bits of all tensors of the layer in the checkpoint
    """
    weight = stored_weight(layer)
    if scheme.weights is None:
        return weight.numel() * weight.itemsize * 8
    rows, columns = weight.shape
    return saved_bits_of_shape(
        (rows, columns), weight.dtype, scheme, isinstance(layer, nn.Embedding)
    )


def saved_bits_of_shape(
    shape: tuple[int, int], dtype: torch.dtype, scheme: QuantizationScheme, is_embedding: bool
) -> int:
    """
    :param shape: of the weight, rows and columns
    :param dtype: of the weight before it is quantized
    :param scheme: with ``weights``
    :return: as `saved_bits`
    """
    # as text: schemes are not hashable
    return _compressed_bits(is_embedding, *shape, dtype, scheme.model_dump_json())


@functools.cache
def _compressed_bits(
    is_embedding: bool, rows: int, columns: int, dtype: torch.dtype, scheme_json: str
) -> int:
    """A layer of zeros is compressed: no formula of ours can then differ from the file."""
    scheme = QuantizationScheme.model_validate_json(scheme_json)
    choose_saved_format(scheme)
    layer: Layer
    if is_embedding:
        layer = nn.Embedding(rows, columns, dtype=dtype, device="cpu")
    else:
        layer = nn.Linear(columns, rows, bias=False, dtype=dtype, device="cpu")
    layer.quantization_scheme = scheme
    initialize_module_for_quantization(layer, scheme)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(0 if name == "weight" or "zero_point" in name else 1)
    compress_module(layer)
    return sum(tensor.nbytes for tensor in layer.state_dict().values()) * 8
