"""How far V moves in a sign step, channel by channel."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from conftest import quantize, tiny_llama, token_samples
from hypothesis import given
from hypothesis import strategies as st

from autoround_modifier import AutoRoundModifier
from autoround_modifier.formats import GroupFormat, group_format, make_format
from autoround_modifier.formats.speed import channel_speed

SCHEMES = {
    "group": {"num_bits": 2, "type": "int", "strategy": "group", "group_size": 32},
    "ragged group": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64},
    "channel": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [24, 40]},
}


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_speed_falls_with_the_fourth_root_of_importance(importance):
    h = torch.tensor(importance, dtype=torch.float64)
    typical = h.sort().values[(len(h) - 1) // 2]
    expected = (typical / h).sqrt().sqrt().clamp(1 / 8, 8)
    torch.testing.assert_close(channel_speed(h), expected.float())
    torch.testing.assert_close(channel_speed(1e20 * h), channel_speed(h))


def test_unused_channels_do_not_slow_others():
    speed = channel_speed(torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 16.0]))
    assert speed.tolist() == [8, 8, 8, 1, 1, 0.5]
    assert channel_speed(torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_channel_moves_at_its_own_speed(scheme, fused, monkeypatch):
    monkeypatch.setattr(group_format, "SLICE_ELEMENTS", 1000)  # several slices
    args = QuantizationArgs(symmetric=True, **SCHEMES[scheme])
    weight, gradient = torch.randn(2, 50, 96).bfloat16()
    importance = torch.rand(96) ** 4
    fmt = make_format(weight, args, None, None, importance, fused)
    fmt.make_trainable(tune_clipping=False)
    fmt.descend(gradient, torch.tensor(0.01), torch.tensor(0.0))
    moved = fmt.grouping.join(fmt.rounding).float().abs()
    expected = (0.01 * channel_speed(importance)).expand(weight.shape)
    inside = moved > 0  # not cut off
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(moved[inside], expected[inside], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("scale_search", [True, False])
@pytest.mark.parametrize("scheme", ["group", "tensor"])
def test_channels_differ_where_scales_are_searched(scheme, scale_search, monkeypatch):
    formats = []
    make_trainable = GroupFormat.make_trainable

    def record(fmt, *args):
        formats.append(fmt)
        make_trainable(fmt, *args)

    monkeypatch.setattr(GroupFormat, "make_trainable", record)
    weights = {"symmetric": True, **SCHEMES[scheme]}
    recipe = AutoRoundModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        iters=1,
        scale_search=scale_search,
    )
    quantize(tiny_llama(), recipe, token_samples(8))
    assert len(formats) == 14
    for fmt in formats:
        if scale_search:
            assert fmt.channels.float().std() > 0.01
        else:
            assert fmt.channels is None
