"""host/attention.py: the attention implementation is a field of the configuration."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.utils import patch_attr
from conftest import tiny_llama
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autoround_modifier.host.attention import sdpa_computes_the_same, tuning_attention

SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}


class Plain(nn.Module):
    """No model of Transformers."""


def gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_a_llama_can_be_tuned_in_sdpa(implementation):
    model = tiny_llama(num_layers=1)
    model.config._attn_implementation = implementation
    assert sdpa_computes_the_same(model)


@pytest.mark.parametrize(("cap", "expected"), [(50.0, False), (None, True)])
def test_capped_logits_are_not_computed_by_sdpa(cap, expected):
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, attn_logit_softcapping=cap))
    assert sdpa_computes_the_same(model) is expected


def test_sinks_are_not_computed_by_sdpa():
    assert not sdpa_computes_the_same(gpt_oss())
    model = tiny_llama(num_layers=1)
    attention = model.model.layers[0].self_attn
    attention.sinks = None  # as MiMo-V2 has it in layers without
    assert sdpa_computes_the_same(model)
    attention.sinks = nn.Parameter(torch.zeros(4))
    assert not sdpa_computes_the_same(model)


def test_a_module_without_configuration_stays_as_it_is():
    assert not sdpa_computes_the_same(Plain())


def test_the_configuration_chooses_in_each_call(monkeypatch):
    model = tiny_llama(num_layers=1)
    ran = []

    def recorded(name):
        original = ALL_ATTENTION_FUNCTIONS[name]

        def attention(*args, **kwargs):
            ran.append(name)
            return original(*args, **kwargs)

        return attention

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", recorded("sdpa"))
    tokens = torch.arange(4).view(1, 4)
    with patch_attr(model.config, "_attn_implementation", "eager"), torch.no_grad():
        model(tokens)
        assert ran == []
        with tuning_attention(model, sdpa=False):
            model(tokens)
        assert ran == []
        with tuning_attention(model, sdpa=True):
            model(tokens)
        assert ran == ["sdpa"]
        assert model.config._attn_implementation == "eager"
