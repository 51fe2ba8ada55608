"""The integer quantize-dequantize: parity with compressed-tensors, gradients, ranges."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround_modifier.formats.integer import (
    IntegerFormat,
    asymmetric_qparams,
    integer_fake_quantize,
    integer_range,
    symmetric_scale,
)


def args_of(num_bits: int, symmetric: bool, group_size: int | None = 32) -> QuantizationArgs:
    strategy = "channel" if group_size is None else "group"
    return QuantizationArgs(
        num_bits=num_bits, symmetric=symmetric, strategy=strategy, group_size=group_size
    )


def test_ranges():
    assert integer_range(2) == (-2, 1)
    assert integer_range(8) == (-128, 127)


def test_symmetric_scale_puts_the_extreme_on_the_lowest_integer():
    w_min, w_max = torch.tensor([-3.0, -1.0, 0.0]), torch.tensor([1.0, 4.0, 0.0])
    scale = symmetric_scale(w_min, w_max, num_bits=2)
    assert scale[:2].tolist() == [1.5, -2.0]  # -3 / -2 and 4 / -2
    assert scale[2] > 0  # a group of zeros still has a usable scale


def test_asymmetric_qparams_map_both_ends():
    scale, zero_point = asymmetric_qparams(torch.tensor([-1.0]), torch.tensor([2.0]), num_bits=2)
    assert scale.tolist() == [1.0]
    assert zero_point.tolist() == [-1.0]  # -1.0 -> integer -2, 0.0 -> -1, 2.0 -> 1


@settings(max_examples=60, deadline=None)
@given(
    num_bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([None, 8, 32]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    kind=st.sampled_from(["normal", "zeros", "constant", "one_hot", "tiny", "huge"]),
    seed=st.integers(0, 1000),
)
def test_parity_with_compressed_tensors(num_bits, symmetric, group_size, rows, groups, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 32 * groups, generator=generator)
    weight = {
        "normal": weight,
        "zeros": torch.zeros_like(weight),
        "constant": torch.full_like(weight, -0.7),
        "one_hot": torch.nn.functional.one_hot(torch.arange(rows), 32 * groups).float(),
        "tiny": weight * 1e-30,
        "huge": weight * 1e30,
    }[kind]
    args = args_of(num_bits, symmetric, group_size)
    ours = IntegerFormat(weight, args).quantized()
    theirs = fake_quantize(weight, ours.scale, ours.zero_point, args)
    assert torch.isfinite(ours.dequantized).all()
    torch.testing.assert_close(ours.dequantized, theirs, rtol=0, atol=0)
    again = dequantize(ours.values, ours.scale, ours.zero_point, args=args)
    torch.testing.assert_close(ours.dequantized, again, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward_is_what_is_saved(symmetric, dtype):
    weight = torch.randn(16, 64).to(dtype)
    fmt = IntegerFormat(weight, args_of(3, symmetric))
    fmt.make_trainable(tune_clipping=True)
    with torch.no_grad():
        fmt.rounding.uniform_(-0.5, 0.5)
        for factor in fmt.clipping:
            factor.uniform_(0.5, 1.0)
    saved = fmt.quantized()
    assert fmt.forward().dtype == dtype
    torch.testing.assert_close(fmt.forward(), saved.dequantized, rtol=0, atol=0)
    assert torch.equal(saved.scale.float(), fmt.qparams()[0].squeeze(-1))  # no hidden precision


def surrogate(weight, rounding, scale, zero_point, num_bits):
    """The same function without rounding: what the straight-through gradient pretends."""
    q_min, q_max = integer_range(num_bits)
    q = (weight / scale + rounding + zero_point).clamp(q_min, q_max)
    return scale * (q - zero_point)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_gradients_of_v_and_zero_point(num_bits):
    torch.manual_seed(0)
    weight = torch.randn(6, 2, 16)
    scale = torch.full((6, 2, 1), 2.5 / 2**num_bits)  # clips some weights
    zero_point = torch.randint(-1, 2, (6, 2, 1)).float()
    # V that moves each weight onto an integer: there the surrogate equals the rounded function
    rounding = (weight / scale).round() - weight / scale
    cotangent = torch.randn(6, 2, 16)
    inputs = [rounding, scale, zero_point]
    grads = []
    for fn in (integer_fake_quantize, surrogate):
        leaves = [x.clone().requires_grad_() for x in inputs]
        fn(weight, *leaves, num_bits).backward(cotangent)
        grads.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_clipping_factors_receive_gradients():
    for symmetric in (True, False):
        fmt = IntegerFormat(torch.randn(4, 64), args_of(2, symmetric))
        fmt.make_trainable(tune_clipping=True)
        fmt.forward().square().sum().backward()
        assert any(factor.grad.abs().sum() > 0 for factor in fmt.clipping)
        assert fmt.rounding.grad.abs().sum() > 0
