"""Reads quantized weights back: from layers in memory, and from tensors as they are saved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from compressed_tensors.quantization.lifecycle.forward import quantize
from torch import Tensor, nn

from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.formats.floating import FLOAT32_BIAS, power_of_two
from autoround_modifier.host.layers import Layer
from autoround_modifier.host.packed import unpack_e2m1, unpack_integers
from autoround_modifier.host.schemes import (
    QuantizationArgs,
    QuantizationStatus,
    unsupported_weights,
    weight_spec,
)

__all__ = ["matches_saved_layer", "quantized_layers", "read_layer", "read_saved_layer"]


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Layer, QuantizationArgs]]:
    """Yield name, layer and weight arguments of each layer with a weight format known here."""
    for name, module in model.named_modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if isinstance(module, (nn.Linear, nn.Embedding)) and unsupported_weights(args) is None:
            yield name, module, args


@torch.no_grad()
def read_layer(
    layer: Layer, args: QuantizationArgs, dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:
    """
    :param layer: with the scale of its scheme; its weight is dequantized, or compressed, as it is
        after saving, or decompressed, as it is once the model has run after saving
    :param args: how the weight is quantized
    :param dtype: of the dequantized weight; used where the layer is compressed
    :return: what is saved, or was, in tensors of its own. Of a decompressed weight of 8 bits with
        a zero point, integers may be one off those in the checkpoint, where both give the same
        weight
    """
    status = getattr(layer, "quantization_status", None)
    if status == QuantizationStatus.COMPRESSED:
        tensors = {name: x.detach() for name, x in layer.named_parameters(recurse=False)}
        tensors |= dict(layer.named_buffers(recurse=False))
        return _copied(read_saved_layer(tensors, args, dtype))
    weight, spec = layer.weight.detach(), weight_spec(args)
    grid = spec.grid(weight.dtype)
    scale = cast(Tensor, layer.weight_scale).detach()
    zero_point = getattr(layer, "weight_zero_point", None)
    zero_point = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
    global_scale = getattr(layer, "weight_global_scale", None)
    # Saving quantizes in the weight's dtype, for which the weight was chosen (`write_back`). A
    # decompressed weight is a product that was rounded to that dtype: dividing in float32 finds its
    # integer, except where bfloat16 gives two integers, far from zero, the same weight.
    wide = status == QuantizationStatus.DECOMPRESSED
    codes = quantize(
        weight.float() if wide else weight,
        scale.float() if wide else scale,
        zero_point,
        args,
        global_scale=global_scale,
    )
    parts = {
        "values": codes.to(grid.code_dtype),  # type: ignore[attr-defined]
        "scale": scale,
        "zero_point": zero_point.detach().to(torch.int8),  # E4M3 for floating-point numbers
    }
    if global_scale is not None:
        parts["global_scale"] = global_scale.detach()
    return _copied(QuantizedWeight(parts, grid, spec.grouping(tuple(weight.shape))))


def read_saved_layer(
    tensors: Mapping[str, Tensor], args: QuantizationArgs, dtype: torch.dtype
) -> QuantizedWeight:
    """
    :param tensors: of one layer, as compressed-tensors saves them: ``weight`` or
        ``weight_packed``, ``weight_scale``, ...
    :param args: how the weight is quantized; see `matches_saved_layer`
    :param dtype: of the dequantized weight
    """
    shape, spec = _saved_shape(tensors), weight_spec(args)
    assert shape is not None
    scale = tensors["weight_scale"]
    if scale.dtype == torch.uint8:  # E8M0 (OCP Microscaling Formats v1.0, section 5.4.1)
        scale = power_of_two(scale.to(torch.int32) - FLOAT32_BIAS).to(dtype)
    elif scale.dtype == torch.float8_e4m3fn:
        scale = scale.to(dtype)
    elif scale.dtype != dtype:
        spec = replace(spec, scale_dtype=scale.dtype)
    grid, grouping = spec.grid(dtype), spec.grouping(shape)
    packed = tensors.get("weight_packed")
    if packed is None:
        values = tensors["weight"]
    elif packed.dtype == torch.uint8:
        values = unpack_e2m1(packed).to(torch.float8_e4m3fn)
    else:
        values = unpack_integers(packed, spec.num_bits, shape)
    zero_point = tensors.get("weight_zero_point")
    if zero_point is None:
        zero_point = torch.zeros(grouping.scale_shape, dtype=torch.int8, device=scale.device)
    elif zero_point.dtype == torch.int32:  # packed along the rows
        zero_point = unpack_integers(zero_point, spec.num_bits, grouping.scale_shape, dim=0)
    parts = {
        "values": values,
        "scale": scale.reshape(grouping.scale_shape),
        "zero_point": zero_point.to(torch.int8).reshape(grouping.scale_shape).contiguous(),
    }
    if "weight_global_scale" in tensors:
        parts["global_scale"] = tensors["weight_global_scale"]
    return QuantizedWeight(parts, grid, grouping)


def matches_saved_layer(tensors: Mapping[str, Tensor], args: QuantizationArgs) -> bool:
    """
    :param tensors: see `read_saved_layer`
    :return: whether tensors of these names, dtypes and shapes are what compressed-tensors makes of
        a weight with these arguments. Integers that are one to a byte may have fewer than 8 bits
    """
    shape = _saved_shape(tensors)
    if shape is None or unsupported_weights(args) is not None or "weight_scale" not in tensors:
        return False
    spec = weight_spec(args)
    scale, packed = tensors["weight_scale"], tensors.get("weight_packed")
    if packed is None:
        dtypes = {torch.int8: (True, 8), torch.float8_e4m3fn: (False, 8)}
        is_integer, num_bits = dtypes.get(tensors["weight"].dtype, (None, 0))
        right_values = spec.is_integer == is_integer and spec.num_bits <= num_bits
    elif packed.dtype == torch.uint8:
        right_values = not spec.is_integer and spec.num_bits == 4
    else:
        words = math.ceil(shape[1] * spec.num_bits / 32)
        right_values = spec.is_integer and packed.shape == (shape[0], words)
    return (
        right_values
        and tuple(scale.shape) == spec.grouping(shape).scale_shape
        and (scale.dtype == torch.uint8) == spec.power_of_two_scale
        and ("weight_zero_point" in tensors) != spec.symmetric
        and ("weight_global_scale" in tensors) == spec.global_scale
    )


def _saved_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """:return: (out_features, in_features) of a saved weight; None if it has no known layout"""
    packed = tensors.get("weight_packed")
    shape: Sequence[int] = ()
    if packed is None:
        shape = tensors["weight"].shape if "weight" in tensors else ()
    elif packed.dtype == torch.uint8:
        shape = (packed.shape[0], 2 * packed.shape[1])
    elif "weight_shape" in tensors:
        shape = tensors["weight_shape"].tolist()
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _copied(weight: QuantizedWeight) -> QuantizedWeight:
    parts = {
        name: part.clone(memory_format=torch.contiguous_format)
        for name, part in weight.parts.items()
    }
    return QuantizedWeight(parts, weight.grid, weight.grouping)
