"""host/experts.py: experts in linear layers, and which tokens they compute for."""

from __future__ import annotations

import torch
from llmcompressor.modeling.moe import context
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from autoround_modifier.host.experts import (
    LinearExperts2D,
    all_experts_see_all_tokens,
    routed_experts_only,
)


def mixture() -> nn.Module:
    """:return: the experts of a random model with four experts of which each token takes one"""
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=1,
        dtype=torch.float32,
    )
    model = MixtralForCausalLM(config)
    linearize_moe(model)
    return model.model.layers[0].mlp.experts


def test_experts_are_linear_layers_by_index():
    experts = mixture()
    assert isinstance(experts, LinearExperts2D)
    assert experts.num_experts == 4
    linear = [x for index in range(4) for x in experts[index].modules() if isinstance(x, nn.Linear)]
    assert len(linear) == 12
    assert linear[0].weight.shape == (16, 16)


def test_experts_are_called_with_hidden_states_and_their_choice():
    """In the order of `torch.where((chosen == index).T)`; all see all tokens in calibration."""
    experts, seen, called = mixture(), {}, []
    experts.register_forward_pre_hook(lambda module, args: called.append(args))
    for index in range(4):
        experts[index].register_forward_pre_hook(
            lambda module, args, index=index: seen.__setitem__(index, args[0])
        )
    hidden = torch.randn(5, 16)
    chosen = torch.tensor([[2], [0], [2], [1], [0]])
    weights = torch.ones(5, 1)

    def tokens_of(index: int) -> list[int]:
        rows = seen[index][:, None] == hidden
        return rows.all(-1).nonzero()[:, 1].tolist()

    with torch.no_grad(), context.moe_calibration_context():
        assert context._CALIBRATE_ALL_EXPERTS
        assert all_experts_see_all_tokens()
        everywhere = experts(hidden, chosen, weights)
        assert [tokens_of(index) for index in range(4)] == [[0, 1, 2, 3, 4]] * 4
        with routed_experts_only():
            assert not all_experts_see_all_tokens()
            routed = experts(hidden, chosen, weights)
        assert [tokens_of(index) for index in range(4)] == [[1, 4], [3], [0, 2], []]
        assert context._CALIBRATE_ALL_EXPERTS
    assert not context._CALIBRATE_ALL_EXPERTS
    assert not all_experts_see_all_tokens()
    torch.testing.assert_close(everywhere, routed)
    assert torch.equal(called[0][0], hidden)
    assert torch.equal(called[0][1], chosen)
