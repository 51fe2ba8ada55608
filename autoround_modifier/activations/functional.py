"""Quantization of activations by compressed-tensors' own functions, without a module."""

from __future__ import annotations

from torch import Tensor

from autoround_modifier.activations.support import needs_calibration
from autoround_modifier.host.activations import (
    calculate_qparams,
    calculate_range,
    compute_dynamic_scales_and_zp,
    fake_quantize,
    generate_gparam,
)
from autoround_modifier.host.schemes import QuantizationArgs, QuantizationType, has_global_scale

__all__ = ["fake_quantize_activation", "fake_quantize_in_range"]

E4M3_LAST_STEP = 32.0  # between 416 and 448


def fake_quantize_activation(
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    args: QuantizationArgs,
) -> tuple[Tensor, Tensor | None]:
    """
    :param x: three dimensions or more
    :return: what compressed-tensors' `forward_quantize` gives with these parameters, and where
        ``x`` is within the range of a static scale, or rounds to its end; None if it always is
    """
    if args.dynamic:
        scale, zero_point = compute_dynamic_scales_and_zp(x, args, None, global_scale)
        quantized = fake_quantize(x, scale, zero_point, args, global_scale)
        return quantized.to(x.dtype), None
    assert scale is not None
    quantized = fake_quantize(x, scale, zero_point, args, global_scale)
    q_min, q_max = calculate_range(args, x.device)
    offset = 0 if zero_point is None else zero_point.float()
    half_step = 0.5 if args.type == QuantizationType.INT else E4M3_LAST_STEP / 2
    low, high = q_min - offset - half_step, q_max - offset + half_step
    return quantized.to(x.dtype), (x >= low * scale.float()) & (x <= high * scale.float())


def fake_quantize_in_range(x: Tensor, args: QuantizationArgs, low: Tensor, high: Tensor) -> Tensor:
    """
    :param x: the input of a layer, (..., in_features)
    :param args: of its input activations
    :param low: smallest activation seen, (1,); counts where a scale is static
    :param high: the largest
    :return: ``x`` after quantization and dequantization, same shape and dtype
    """
    scale = zero_point = global_scale = None
    if has_global_scale(args):
        global_scale = generate_gparam(low, high)
    elif needs_calibration(args):
        scale, zero_point = calculate_qparams(low, high, args)
    # compressed-tensors would take the tokens of a two-dimensional input for one
    batched = x if x.ndim > 2 else x.unsqueeze(0)
    quantized, _ = fake_quantize_activation(batched, scale, zero_point, global_scale, args)
    return quantized.view_as(x)
