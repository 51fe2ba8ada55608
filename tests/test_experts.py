"""Experts of a mixture: which tokens count, and weights that exist only while they are used."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from conftest import quantize, token_samples
from helpers import search_range, tuned_weight
from llmcompressor.modeling.moe.context import (
    get_calibrate_all_experts_flag,
    moe_calibration_context,
)
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from autoround_modifier import AutoRoundModifier
from autoround_modifier.blocks.experts import ExpertRouting
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.blocks.importance import Importance
from autoround_modifier.blocks.samples import BlockCall
from autoround_modifier.formats import TunedWeight
from autoround_modifier.host.experts import routed_experts_only
from autoround_modifier.tuning import Tuner, TuningConfig

WEIGHTS = QuantizationArgs(num_bits=2, strategy="group", group_size=32)
NEVER = 3  # the number of an expert that the router never chooses


def mixture(folder: Path) -> MixtralForCausalLM:
    """A random model of two blocks with four experts, loaded from disk."""
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        max_position_embeddings=64,
        dtype=torch.bfloat16,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    linearize_moe(model)
    return model


def never_route_to(model: MixtralForCausalLM, expert: int) -> None:
    """Tokens have one channel of ones, by which the router keeps away from an expert."""
    for block in model.model.layers:
        router = block.mlp.gate

        def leave_out(module, args, output):
            logits, *_ = output
            logits = logits.clone()
            logits[..., expert] = -1e4
            weights, chosen = logits.float().softmax(-1).topk(2, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights.to(output[1].dtype), chosen

        router.register_forward_hook(leave_out)


@pytest.mark.parametrize("all_experts", [True, False])
def test_only_routed_tokens_count(all_experts, tmp_path):
    """The importance of an expert's inputs is that of its own tokens, whoever else sees them."""
    model = mixture(tmp_path)
    routing = ExpertRouting(model)
    capture, seen = Importance(), {}
    assert len(routing.layers) == 2 * 4 * 3
    block = model.model.layers[0].mlp.experts
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False

    def record(layer, args):
        capture.record(layer, routing.select(layer, args[0]))

    def enter(module, args):
        routing.enter(module, args, mask)
        seen["hidden"], seen["chosen"] = args[0], args[1]

    block.register_forward_pre_hook(enter)
    for expert in range(4):
        block[expert].gate_proj.register_forward_pre_hook(record)
    ids = torch.tensor(token_samples(2)["input_ids"])
    with torch.no_grad(), moe_calibration_context():
        if all_experts:
            model(ids)
        else:
            with routed_experts_only():
                assert not get_calibrate_all_experts_flag()
                model(ids)
            assert get_calibrate_all_experts_flag()
    total = 0
    for expert in range(4):
        mine = (seen["chosen"] == expert).any(-1) & mask.flatten()
        num_tokens = capture.num_tokens(block[expert].gate_proj)
        importance = capture.pop(block[expert].gate_proj)
        assert num_tokens == int(mine.sum())
        expected = seen["hidden"][mine].float().square().sum(0)
        torch.testing.assert_close(importance.float(), expected)
        total += num_tokens
    assert total == 2 * int(mask.sum())


def test_llama4_experts_count_no_zero_rows():
    class Mixture(nn.ModuleList):
        num_experts = 2

    experts = Mixture([nn.Linear(4, 4), nn.Linear(4, 4)])
    routing = ExpertRouting(nn.Module())
    routing.layers = {experts[0]: (experts, 0), experts[1]: (experts, 1)}
    hidden = torch.zeros(6, 4)
    hidden[1], hidden[2], hidden[3] = 1.0, 2.0, 3.0  # two tokens of the first, one of the second
    mask = torch.tensor([[True, True, False]])
    for all_shown in (True, False):
        with moe_calibration_context() if all_shown else nullcontext():
            routing.enter(experts, (hidden,), mask)
        for x, layer, rows in (
            (hidden[:3], experts[0], [1]),  # token 2 is padding
            (hidden[3:], experts[1], [3]),
        ):
            x = hidden if all_shown else x
            assert torch.equal(routing.select(layer, x), hidden[rows])


def test_experts_without_tokens_are_searched_alone(log, tmp_path):
    model = mixture(tmp_path)
    never_route_to(model, NEVER)
    modifier = AutoRoundModifier(
        iters=4,
        batch_size=4,
        ignore=["lm_head"],
        config_groups={"group_0": {"targets": ["Linear"], "weights": WEIGHTS.model_dump()}},
        min_expert_tokens=1,
    )
    experts = [block.mlp.experts[NEVER] for block in model.model.layers]
    layers = [x for expert in experts for x in expert.modules() if isinstance(x, nn.Linear)]
    originals = [layer.weight.detach().clone() for layer in layers]
    quantize(model, modifier)
    assert [report.scarce_experts for report in modifier.block_reports] == [3, 3]
    (line,) = [line for line in log if "fewer than 1" in line and "layers.1" in line]
    assert "3 of 12 layers of experts" in line
    assert f"model.layers.1.mlp.experts.{NEVER}.gate_proj (0)" in line
    for layer, original in zip(layers, originals, strict=True):
        searched = tuned_weight(original, WEIGHTS, search_range(original, WEIGHTS)).quantized()
        assert torch.equal(layer.weight, searched.dequantize())


def test_experts_with_one_scale_for_the_tensor_are_tuned(tmp_path):
    model = mixture(tmp_path)
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    modifier = AutoRoundModifier(
        iters=2,
        batch_size=4,
        ignore=["lm_head"],
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        min_expert_tokens=5,
        engine="transformers",  # vLLM has no such experts
    )
    quantize(model, modifier)
    assert [report.scarce_experts for report in modifier.block_reports] == [0, 0]


class Experts(nn.Module):
    """Two layers, of which the second sees the first tokens only."""

    def __init__(self):
        super().__init__()
        self.every, self.few = (nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        y = self.every(x).tanh()
        return y + nn.functional.pad(self.few(y[:, :5]), (0, 0, 0, y.shape[1] - 5))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_on_demand_give_the_same_integers(accumulate, compiled):
    def tuned(experts_on_demand: bool):
        torch.manual_seed(0)
        block = Experts()
        inputs = [torch.randn(1, 8, 32) for _ in range(8)]
        with torch.no_grad():
            targets = [block(x) for x in inputs]
        formats = {
            layer: tuned_weight(layer.weight, WEIGHTS, compiled=compiled)
            for layer in (block.every, block.few)
        }
        config = TuningConfig(iters=10, batch_size=2, gradient_accumulate_steps=accumulate)
        group = BlockGroup([block], [[BlockCall((), {}) for _ in inputs]])
        experts = {block.few} if experts_on_demand else ()
        tuner = Tuner(group, formats, inputs, targets, [None] * 8, config, experts=experts)
        return tuner.run()

    apart, together = tuned(True), tuned(False)
    assert apart.best_iteration == together.best_iteration > 0
    for one, other in zip(apart.weights.values(), together.weights.values(), strict=True):
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.scale, other.scale)


class ManyExperts(nn.Module):
    def __init__(self, num_experts: int):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(num_experts)])

    def forward(self, x):
        return sum(expert(x) for expert in self.experts).tanh()


@pytest.mark.parametrize("num_experts", [2, 12])
def test_one_expert_is_dequantized_at_a_time(num_experts, monkeypatch):
    """Whatever their number, never more than the weight in use and the one made after it exist."""
    alive: list[weakref.ref] = []
    most = 0
    original = TunedWeight.dequantize

    def dequantize(fmt):
        nonlocal most
        weight = original(fmt)
        alive.append(weakref.ref(weight))
        most = max(most, sum(ref() is not None for ref in alive))
        return weight

    monkeypatch.setattr(TunedWeight, "dequantize", dequantize)
    block = ManyExperts(num_experts)
    inputs = [torch.randn(1, 8, 32) for _ in range(4)]
    with torch.no_grad():
        targets = [block(x) for x in inputs]
    formats = {layer: tuned_weight(layer.weight, WEIGHTS) for layer in block.experts}
    group = BlockGroup([block], [[BlockCall((), {}) for _ in inputs]])
    config = TuningConfig(iters=3, batch_size=2)
    experts = set(block.experts)
    Tuner(group, formats, inputs, targets, [None] * 4, config, experts=experts).run()
    assert len(alive) > 3 * 2 * num_experts
    assert most <= 2
