"""Which activations go with which weights, decided by `QuantizationArgs` and never by a name."""

from __future__ import annotations

from autoround_modifier.host.activations import observer_names
from autoround_modifier.host.schemes import (
    DynamicType,
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    has_global_scale,
    is_microscaling,
)

__all__ = ["needs_calibration", "unsupported_activations", "unsupported_kv_cache"]


def needs_calibration(args: QuantizationArgs | None) -> bool:
    """:return: whether a scale has to be found on calibration data"""
    return args is not None and args.dynamic is not True


def unsupported_activations(scheme: QuantizationScheme) -> str | None:
    """:return: why the activations do not go with the weights of a scheme, or None if they do"""
    if scheme.output_activations is not None:
        return "`output_activations` are not supported; quantize the inputs of the next layer"
    weights, inputs = scheme.weights, scheme.input_activations
    if weights is None or inputs is None:
        return None
    unknown = _unknown_observer(inputs)
    if unknown is not None:
        return unknown
    if inputs.type == QuantizationType.FLOAT and not inputs.symmetric:
        return "floating-point activations have no zero point; set `symmetric: true`"

    if has_global_scale(weights):
        if has_global_scale(inputs) and inputs.group_size == 16 and _is_local(inputs):
            return None
        return (
            "NVFP4 weights go with NVFP4 activations: 4 bits, float, `strategy: tensor_group`, "
            "`group_size: 16`, `dynamic: local`; or with 16-bit activations"
        )
    if is_microscaling(weights):
        same = is_microscaling(inputs) and inputs.num_bits == weights.num_bits
        if same and inputs.group_size == 32 and inputs.dynamic is True:
            return None
        if weights.num_bits == 4 and _is_float8(inputs) and _is_dynamic(inputs, "token", "group"):
            return None
        return (
            "MX weights go with dynamic activations of the same format (float, `strategy: group`, "
            "`group_size: 32`, `scale_dtype: torch.uint8`), MXFP4 weights with dynamic FP8 as well"
        )
    if weights.type == QuantizationType.FLOAT:
        if _goes_with_float8(weights, inputs):
            return None
        return (
            "FP8 weights by tensor or channel go with FP8 activations, dynamic by `token` or "
            "`tensor` or static by `tensor`; FP8 weights by block with FP8 activations, dynamic by "
            "`group`, as long as the block is wide"
        )
    if _is_float8(inputs) and _is_dynamic(inputs, "token"):
        packed = weights.num_bits == 4 and weights.symmetric
        if packed and weights.strategy == QuantizationStrategy.GROUP:
            return None
        return (
            "FP8 activations go with integer weights of 4 bits, symmetric, by `group` only (W4AFP8)"
        )
    is_integer = inputs.type == QuantizationType.INT and inputs.num_bits in (4, 8)
    if is_integer and (
        _is_dynamic(inputs, "token", "tensor", "group") or _is_static_tensor(inputs)
    ):
        return None
    return (
        "integer weights go with integer activations of 4 or 8 bits, dynamic by `token`, `tensor` "
        "or `group` or static by `tensor`, or with FP8 activations, dynamic by `token`"
    )


def _goes_with_float8(weights: QuantizationArgs, inputs: QuantizationArgs) -> bool:
    if not _is_float8(inputs) or is_microscaling(inputs):
        return False
    if weights.strategy == QuantizationStrategy.BLOCK:
        assert weights.block_structure is not None
        return _is_dynamic(inputs, "group") and inputs.group_size == weights.block_structure[1]
    whole = (QuantizationStrategy.TENSOR, QuantizationStrategy.CHANNEL)
    return weights.strategy in whole and (
        _is_dynamic(inputs, "token", "tensor") or _is_static_tensor(inputs)
    )


def unsupported_kv_cache(args: QuantizationArgs) -> str | None:
    """:return: why engines cannot keep a key-value cache this way, or None if they can"""
    strategies = (QuantizationStrategy.TENSOR, QuantizationStrategy.ATTN_HEAD)
    static = not args.dynamic and args.strategy in strategies
    if static and _is_float8(args) and args.symmetric:
        return _unknown_observer(args)
    return (
        "kv_cache_scheme: the key-value cache takes static symmetric FP8: `num_bits: 8`, "
        "`type: float`, `symmetric: true`, `dynamic: false`, `strategy: tensor` or `attn_head`"
    )


def _unknown_observer(args: QuantizationArgs) -> str | None:
    names = observer_names()
    if args.observer is None or args.observer.lower().replace("-", "_") in names:
        return None
    return f"unknown observer `{args.observer}`; use {', '.join(names)}"


def _is_float8(args: QuantizationArgs) -> bool:
    return args.type == QuantizationType.FLOAT and args.num_bits == 8


def _is_local(args: QuantizationArgs) -> bool:
    return args.dynamic == DynamicType.LOCAL


def _is_dynamic(args: QuantizationArgs, *strategies: str) -> bool:
    return args.dynamic is True and args.strategy in map(QuantizationStrategy, strategies)


def _is_static_tensor(args: QuantizationArgs) -> bool:
    return not args.dynamic and args.strategy == QuantizationStrategy.TENSOR
