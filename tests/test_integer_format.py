"""The integer quantize-dequantize: parity with compressed-tensors, gradients, ranges."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize
from helpers import tuned_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from autoround_modifier import device
from autoround_modifier.formats import TunedWeight
from autoround_modifier.formats.integer import (
    asymmetric_qparams,
    integer_quantize,
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
    ours = tuned_weight(weight, args).quantized()
    theirs = fake_quantize(weight, ours.scale, ours.zero_point, args)
    assert torch.isfinite(ours.dequantize()).all()
    torch.testing.assert_close(ours.dequantize(), theirs, rtol=0, atol=0)
    again = dequantize(ours.values, ours.scale, ours.zero_point, args=args)
    torch.testing.assert_close(ours.dequantize(), again, rtol=0, atol=0)


def tuned_format(symmetric: bool, dtype: torch.dtype, compiled: bool = False) -> TunedWeight:
    """A format some way into tuning: V and the clipping factors have moved."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    fmt = tuned_weight(weight, args_of(3, symmetric), compiled=compiled)
    fmt.make_trainable(tune_clipping=True)
    fmt.rounding.uniform_(-0.5, 0.5, generator=generator)
    for factor in fmt.clipping:
        factor.uniform_(0.5, 1.0, generator=generator)
    return fmt


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantized_is_made_of_what_is_saved(symmetric, dtype):
    saved = tuned_format(symmetric, dtype).quantized()
    assert saved.dequantize().dtype == saved.scale.dtype == dtype
    again = dequantize(saved.values, saved.scale, saved.zero_point, args=args_of(3, symmetric))
    torch.testing.assert_close(saved.dequantize(), again, rtol=0, atol=0)


def surrogate(weight, rounding, scale, zero_point, num_bits):
    """The same function without rounding: what the straight-through gradient pretends."""
    q_min, q_max = integer_range(num_bits)
    return (weight / scale + rounding + zero_point).clamp(q_min, q_max)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_gradients_of_v_scale_and_zero_point(num_bits):
    torch.manual_seed(0)
    weight = torch.randn(12, 16)
    scale = torch.full((12, 1), 2.5 / 2**num_bits)  # clips some weights
    zero_point = torch.randint(-1, 2, (12, 1)).float()
    # V that moves each weight onto an integer: there the surrogate equals the rounded function
    rounding = (weight / scale).round() - weight / scale
    cotangent = torch.randn(12, 16)
    grads = []
    for fn in (integer_quantize, surrogate):
        leaves = [x.clone().requires_grad_() for x in (rounding, scale, zero_point)]
        _, scale_leaf, zero_point_leaf = leaves
        ((fn(weight, *leaves, num_bits) - zero_point_leaf) * scale_leaf).backward(cotangent)
        grads.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_step_is_one_step_size_against_the_gradient(symmetric):
    """V moves by the sign of gradient times scale, where it is not clipped."""
    fmt = tuned_format(symmetric, torch.float32)
    cotangent = torch.randn(48, 64)
    before = [fmt.rounding.clone(), *(factor.clone() for factor in fmt.clipping)]
    fmt.descend(cotangent, torch.tensor(2.0**-6), torch.tensor(2.0**-6))
    v_step, alpha_step, beta_step = (
        (old - new).float() / 2.0**-6
        for old, new in zip(before, [fmt.rounding, *fmt.clipping], strict=True)
    )
    saved = tuned_format(symmetric, torch.float32).quantized()
    inside = (saved.values > -4) & (saved.values < 3)
    scale = saved.scale.repeat_interleave(32, dim=1)
    expected = (cotangent * scale).sign()
    assert torch.equal(v_step.view(48, 64).round()[inside], expected[inside])
    for step in (alpha_step, beta_step):
        assert set(step.round().unique().tolist()) <= {-1.0, 0.0, 1.0}
        assert step.any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_and_plain_agree(symmetric):
    """The same integers; the same step, but for sums of a group that are next to zero."""
    plain, compiled = (
        tuned_format(symmetric, torch.bfloat16, compiled=flag) for flag in (False, True)
    )
    gradient = torch.randn(48, 64).bfloat16()
    for fmt in (plain, compiled):
        fmt.descend(gradient, torch.tensor(0.02), torch.tensor(0.02))
    assert torch.equal(plain.rounding, compiled.rounding)
    for ours, theirs in zip(plain.clipping, compiled.clipping, strict=True):
        assert (ours != theirs).float().mean() < 0.05
        theirs.copy_(ours)
    ours, theirs = plain.quantized(), compiled.quantized()
    for name in ("values", "scale", "zero_point"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for fmt in (plain, compiled):  # what is tuned is what is saved
        assert torch.equal(fmt.dequantize(), ours.dequantize())


def test_slices_change_nothing(monkeypatch):
    whole = tuned_format(False, torch.bfloat16)
    monkeypatch.setattr(device, "CPU_SLICE_ELEMENTS", 7 * 32)
    sliced = tuned_format(False, torch.bfloat16)
    gradient = torch.randn(48, 64)
    sliced.descend(gradient, torch.tensor(0.1), torch.tensor(0.1))
    values = sliced.quantized().values
    monkeypatch.undo()
    whole.descend(gradient, torch.tensor(0.1), torch.tensor(0.1))
    assert torch.equal(whole.quantized().values, values)
