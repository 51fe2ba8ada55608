"""Numeric formats: one module per family, chosen by `QuantizationArgs`."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
)
from torch import Tensor

from autoround_modifier.formats.base import QuantizedWeight, RoundingFormat
from autoround_modifier.formats.floating import E2M1, E4M3, FloatGrid, MicroscalingGrid, NVFP4Grid
from autoround_modifier.formats.grid import Grid
from autoround_modifier.formats.group_format import GroupFormat
from autoround_modifier.formats.grouping import Grouping
from autoround_modifier.formats.integer import IntegerGrid

__all__ = [
    "FloatGrid",
    "Grid",
    "GroupFormat",
    "Grouping",
    "IntegerGrid",
    "MicroscalingGrid",
    "NVFP4Grid",
    "QuantizedWeight",
    "RoundingFormat",
    "grid_of",
    "has_global_scale",
    "is_microscaling",
    "make_format",
    "unsupported_weights",
]

MICROSCALING_GROUP = 32
NVFP4_GROUP = 16
INTEGER_STRATEGIES = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
FLOAT8_STRATEGIES = (
    QuantizationStrategy.TENSOR,
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.GROUP,
    QuantizationStrategy.BLOCK,
)


def unsupported_weights(weights: QuantizationArgs | None) -> str | None:
    """:return: why weights cannot be quantized like this, or None if they can"""
    if weights is None:
        return "the scheme has no `weights`"
    if weights.dynamic:
        return "weights cannot be `dynamic`"
    if weights.type == QuantizationType.INT:
        if not 2 <= weights.num_bits <= 8:
            return f"num_bits is {weights.num_bits}; use 2 to 8"
        return _wrong_strategy(weights, INTEGER_STRATEGIES)
    if not weights.symmetric:
        return "floating-point weights have no zero point; set `symmetric: true`"
    if has_global_scale(weights):
        if weights.scale_dtype not in (None, torch.float8_e4m3fn):
            return f"scale_dtype is {weights.scale_dtype}; NVFP4 has `torch.float8_e4m3fn`"
        return _wrong_group_size(weights, "tensor_group", NVFP4_GROUP)
    if is_microscaling(weights):
        return _wrong_strategy(weights, (QuantizationStrategy.GROUP,)) or _wrong_group_size(
            weights, "group", MICROSCALING_GROUP
        )
    if weights.num_bits == 8:
        return _wrong_strategy(weights, FLOAT8_STRATEGIES)
    return (
        f"{weights.num_bits}-bit floating-point weights are not supported; use 8 bits, or 4 bits "
        "with `strategy: tensor_group` (NVFP4) or with `scale_dtype: torch.uint8` (MXFP4)"
    )


def has_global_scale(args: QuantizationArgs) -> bool:
    """:return: whether the scales of groups stand under one scale of the tensor (NVFP4)"""
    return (
        args.type == QuantizationType.FLOAT
        and args.num_bits == 4
        and args.strategy == QuantizationStrategy.TENSOR_GROUP
    )


def is_microscaling(args: QuantizationArgs) -> bool:
    """:return: whether scales are powers of two (MXFP4, MXFP8)"""
    return (
        args.type == QuantizationType.FLOAT
        and args.num_bits in (4, 8)
        and args.scale_dtype == torch.uint8
    )


def grid_of(args: QuantizationArgs, dtype: torch.dtype) -> Grid:
    """
    :param args: how the weight is quantized; accepted by `unsupported_weights`
    :param dtype: of the weight
    """
    if args.type == QuantizationType.INT:
        return IntegerGrid.of(args, dtype)
    element = E2M1 if args.num_bits == 4 else E4M3
    if has_global_scale(args):
        return NVFP4Grid(dtype, element)
    return (MicroscalingGrid if is_microscaling(args) else FloatGrid)(dtype, element)


def make_format(
    weight: Tensor,
    args: QuantizationArgs,
    initial_range: tuple[Tensor, Tensor] | None = None,
    global_scale: Tensor | None = None,
    importance: Tensor | None = None,
    fused: bool = False,
) -> RoundingFormat:
    """
    :param weight: (out_features, in_features), full precision
    :param args: how the weight is quantized; accepted by `unsupported_weights`
    :param initial_range: clipping range of each group found by a search
    :param global_scale: (1,), float32, where `has_global_scale`
    :param importance: of input channels, (in_features,), by which sign steps of V differ in length
        (`formats.speed`); None for equal ones
    :param fused: compute with `torch.compile`; the values are the same, sooner
    """
    grid = grid_of(args, weight.dtype)
    return GroupFormat(weight, args, grid, initial_range, global_scale, importance, fused)


def _wrong_strategy(
    args: QuantizationArgs, allowed: tuple[QuantizationStrategy, ...]
) -> str | None:
    if args.strategy in allowed:
        return None
    names = ", ".join(f"`{_plain(strategy)}`" for strategy in allowed)
    return f"strategy `{_plain(args.strategy)}` is not supported here; use {names}"


def _wrong_group_size(args: QuantizationArgs, strategy: str, size: int) -> str | None:
    if args.group_size == size:
        return None
    return f"group_size is {args.group_size}; with `strategy: {strategy}` the format fixes {size}"


def _plain(value: object) -> object:
    return getattr(value, "value", value)
