"""The scale search: never worse than the observed range, close to brute force."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from helpers import search_range, tuned_weight

from autoround_modifier import device


def args_of(num_bits: int, symmetric: bool) -> QuantizationArgs:
    return QuantizationArgs(num_bits=num_bits, symmetric=symmetric, strategy="group", group_size=32)


def error(weight, args, importance, found=None) -> torch.Tensor:
    """:return: (rows, groups), the weighted squared error"""
    quantized = tuned_weight(weight, args, found).quantized()
    scale, zero_point = (
        value.float().repeat_interleave(32, dim=-1)
        for value in (quantized.scale, quantized.zero_point)
    )
    dequantized = (quantized.values.float() - zero_point) * scale
    weighted = (dequantized - weight.float()).square() * importance
    return weighted.unflatten(-1, (-1, 32)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_never_worse_than_the_observed_range(num_bits, symmetric, dtype):
    torch.manual_seed(0)
    weight = torch.randn(64, 96).to(dtype)
    importance = torch.rand(96) ** 4 + 0.01
    args = args_of(num_bits, symmetric)
    before = error(weight, args, importance)
    after = error(weight, args, importance, search_range(weight, args, importance))
    assert (after <= before * 1.0001 + 1e-9).all()
    if num_bits <= 4:
        assert after.sum() < 0.95 * before.sum()


def test_symmetric_search_is_close_to_brute_force():
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    importance = torch.rand(64) + 0.1
    args = args_of(2, True)
    found = error(weight, args, importance, search_range(weight, args, importance))
    zero = torch.zeros(32, 2)
    best = torch.full((32, 2), torch.inf)
    for reach in torch.linspace(0.2, 8.0, 800).tolist():
        for low, high in ((zero - reach, zero), (zero, zero + reach)):
            best = torch.minimum(best, error(weight, args, importance, (low, high)))
    assert found.sum() < 1.02 * best.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_and_plain_find_the_same(symmetric):
    torch.manual_seed(0)
    weight, importance = torch.randn(48, 64).bfloat16(), torch.rand(64)
    args = args_of(2, symmetric)
    plain = search_range(weight, args, importance)
    compiled = search_range(weight, args, importance, compiled=True)
    ours, theirs = (error(weight, args, importance, found) for found in (plain, compiled))
    # Sums may round differently, and a tie then has another winner of the same error.
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_importance_counts():
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    importance = torch.ones(64)
    importance[::4] = 100.0
    args = args_of(2, False)
    weighted = search_range(weight, args, importance)
    plain = search_range(weight, args)
    errors = [error(weight, args, importance, found).sum() for found in (weighted, plain)]
    assert errors[0] < errors[1]


def test_degenerate_groups_stay_finite():
    weight = torch.zeros(3, 64)
    weight[1] = 0.5
    weight[2, 7] = -3.0
    for symmetric in (True, False):
        for importance in (None, torch.zeros(64)):
            args = args_of(2, symmetric)
            low, high = search_range(weight, args, importance)
            assert torch.isfinite(low).all()
            assert torch.isfinite(high).all()
            quantized = tuned_weight(weight, args, (low, high)).quantized()
            assert torch.isfinite(quantized.dequantize()).all()
            assert (quantized.dequantize()[0] == 0).all()


def test_rows_are_independent(monkeypatch):
    weight = torch.randn(40, 64)
    whole = search_range(weight, args_of(3, True))
    monkeypatch.setattr(device, "CPU_SLICE_ELEMENTS", 64 * 7)
    sliced = search_range(weight, args_of(3, True))
    for a, b in zip(whole, sliced, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
