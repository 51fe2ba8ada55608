"""Numeric formats: one module per family, chosen by `QuantizationArgs`."""

from __future__ import annotations

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from torch import Tensor

from autoround_modifier.formats.base import QuantizedWeight, RoundingFormat
from autoround_modifier.formats.integer import IntegerFormat

__all__ = [
    "IntegerFormat",
    "QuantizedWeight",
    "RoundingFormat",
    "make_format",
    "unsupported_reason",
]


def unsupported_reason(scheme: QuantizationScheme) -> str | None:
    """:return: why a layer with this scheme cannot be quantized, or None if it can"""
    weights = scheme.weights
    if weights is None:
        return "the scheme has no `weights`"
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return "quantized activations are not supported"
    if weights.type != QuantizationType.INT:
        return f"weights of type `{_plain(weights.type)}` are not supported; use `int`"
    if not 2 <= weights.num_bits <= 8:
        return f"num_bits is {weights.num_bits}; use 2 to 8"
    if weights.strategy not in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL):
        return f"strategy `{_plain(weights.strategy)}` is not supported; use `group` or `channel`"
    if weights.dynamic:
        return "weights cannot be `dynamic`"
    return None


def make_format(
    weight: Tensor,
    args: QuantizationArgs,
    initial_range: tuple[Tensor, Tensor] | None = None,
    fused: bool = False,
) -> RoundingFormat:
    """
    :param weight: (out_features, in_features), full precision
    :param args: how the weight is quantized; accepted by `unsupported_reason`
    :param initial_range: clipping range found by a search, (out_features, groups) each
    :param fused: compute with `torch.compile`; the values are the same, sooner
    """
    return IntegerFormat(weight, args, initial_range, fused)


def _plain(value: object) -> object:
    return getattr(value, "value", value)
