"""How far V moves in a sign step, channel by channel."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from conftest import quantize, tiny_llama, token_samples
from helpers import quantized_layers, tuned_weight
from hypothesis import given
from hypothesis import strategies as st

from autoround_modifier import AutoRoundModifier, device
from autoround_modifier.blocks.importance import Importance
from autoround_modifier.formats import TunedWeight
from autoround_modifier.formats.speed import channel_speed
from autoround_modifier.search import initial_weights

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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_channel_moves_at_its_own_speed(scheme, compiled, monkeypatch):
    monkeypatch.setattr(device, "CPU_SLICE_ELEMENTS", 1000)  # several slices
    args = QuantizationArgs(symmetric=True, **SCHEMES[scheme])
    weight, gradient = torch.randn(2, 50, 96).bfloat16()
    importance = torch.rand(96) ** 4
    fmt = tuned_weight(weight, args, None, None, importance, compiled)
    start = fmt.quantized()
    fmt.make_trainable(tune_clipping=False)
    fmt.descend(gradient, torch.tensor(0.01), torch.tensor(0.0))
    moved = fmt.grouping.join(fmt.rounding).float()
    values = start.values.float()
    inside = (values > values.min()) & (values < values.max())  # where nothing is cut off
    scale = start.scale.view(-1, 1).repeat(1, fmt.grouping.group_size)
    downhill = -(gradient * fmt.grouping.join(scale)).sign()
    expected = 0.01 * downhill * channel_speed(importance)
    assert inside.float().mean() > 0.3
    torch.testing.assert_close(moved[inside], expected[inside], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("scale_search", [True, False])
@pytest.mark.parametrize("scheme", ["group", "tensor"])
def test_channels_differ_where_scales_are_searched(scheme, scale_search, monkeypatch):
    recorded, used = {}, []
    pop = Importance.pop

    def record(capture, layer):
        recorded[layer] = pop(capture, layer)
        return recorded[layer]

    def use(weight, *rest):
        fmt = TunedWeight(weight, *rest)
        used.append((weight, fmt.channel_speeds))
        return fmt

    monkeypatch.setattr(Importance, "pop", record)
    monkeypatch.setattr(initial_weights, "TunedWeight", use)
    weights = {"symmetric": True, **SCHEMES[scheme]}
    recipe = AutoRoundModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        iters=1,
        scale_search=scale_search,
    )
    model = quantize(tiny_llama(), recipe, token_samples(8))
    layers = {layer.weight: layer for layer in quantized_layers(model).values()}
    assert len(used) == len(layers) == 14
    for weight, speeds in used:
        if scale_search:
            expected = channel_speed(recorded[layers[weight]].float())
            assert torch.equal(speeds.flatten()[: len(expected)], expected)
        else:
            assert speeds is None
