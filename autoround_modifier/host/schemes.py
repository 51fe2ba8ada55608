"""Schemes in the vocabulary of compressed-tensors, and what they mean here."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import (
    DynamicType,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
    is_cached_attention_module,
    is_preset_scheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from autoround_modifier.formats import WeightSpec

__all__ = [
    "DynamicType",
    "QuantizationArgs",
    "QuantizationConfig",
    "QuantizationScheme",
    "QuantizationStatus",
    "QuantizationStrategy",
    "QuantizationType",
    "has_global_scale",
    "is_cached_attention_module",
    "is_microscaling",
    "is_preset_scheme",
    "preset_name_to_scheme",
    "scheme_names",
    "unsupported_weights",
    "weight_spec",
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


def scheme_names() -> list[str]:
    """:return: names of the preset schemes of compressed-tensors, such as ``W4A16``"""
    return list(PRESET_SCHEMES)


def weight_spec(args: QuantizationArgs) -> WeightSpec:
    """
    :param args: how a weight is quantized; accepted by `unsupported_weights`
    :return: the same without compressed-tensors
    """
    assert args.num_bits is not None
    strategy = str(getattr(args.strategy, "value", args.strategy))
    block = args.block_structure
    return WeightSpec(
        element="int" if args.type == QuantizationType.INT else "float",
        num_bits=args.num_bits,
        symmetric=bool(args.symmetric),
        strategy="group" if strategy == "tensor_group" else strategy,  # type: ignore[arg-type]
        group_size=args.group_size,
        block=None if block is None else (block[0], block[1]),
        power_of_two_scale=is_microscaling(args),
        global_scale=has_global_scale(args),
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
    """:return: whether the scales of groups are relative to one scale of the tensor (NVFP4)"""
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
