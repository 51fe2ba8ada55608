"""Reads quantized weights back from layers, as compressed-tensors would save them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from compressed_tensors.quantization.lifecycle.forward import quantize
from torch import Tensor, nn

from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.host.layers import Layer
from autoround_modifier.host.schemes import QuantizationArgs, unsupported_weights, weight_spec

__all__ = ["quantized_layers", "read_layer"]


@torch.no_grad()
def read_layer(layer: Layer, args: QuantizationArgs) -> QuantizedWeight:
    """
    :param layer: with a dequantized weight, and the scale and zero point of its scheme
    :param args: how the weight is quantized
    :return: what saving writes: compressed-tensors quantizes the weight again. In tensors of its
        own
    """
    weight, spec = layer.weight.detach(), weight_spec(args)
    grid = spec.grid(weight.dtype)
    scale = cast(Tensor, layer.weight_scale).detach().clone()
    zero_point = getattr(layer, "weight_zero_point", None)
    zero_point = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
    zero_point = zero_point.detach().clone()
    global_scale = getattr(layer, "weight_global_scale", None)
    codes = quantize(weight, scale, zero_point, args, global_scale=global_scale)
    parts = {
        "values": codes.to(grid.code_dtype),  # type: ignore[attr-defined]
        "scale": scale,
        "zero_point": zero_point,
    }
    if global_scale is not None:
        parts["global_scale"] = global_scale.detach().clone()
    return QuantizedWeight(parts, grid, spec.grouping(tuple(weight.shape)))


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Layer, QuantizationArgs]]:
    """Yield name, layer and weight arguments of each layer with a weight format known here."""
    for name, module in model.named_modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if isinstance(module, (nn.Linear, nn.Embedding)) and unsupported_weights(args) is None:
            yield name, module, args
