"""Which attention implementation blocks are tuned in."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import quantize, tiny_llama, weight_scheme
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autoround_modifier import AutoRoundModifier

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def llama(implementation: str) -> PreTrainedModel:
    folder = tiny_llama().config._name_or_path
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=implementation
    )


MODELS = {
    "capped logits": (Gemma2ForCausalLM, Gemma2Config(**SMALL, attn_logit_softcapping=50.0)),
    "no cap": (Gemma2ForCausalLM, Gemma2Config(**SMALL, attn_logit_softcapping=None)),
    "sinks": (GptOssForCausalLM, GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)),
}


@pytest.fixture
def ran(monkeypatch) -> dict[bool, list[str]]:
    """Names of the attention functions that ran: under True with gradients, else without."""
    found: dict[bool, list[str]] = {True: [], False: []}

    def recorded(name, original):
        def attention(*args, **kwargs):
            found[torch.is_grad_enabled()].append(name)
            return original(*args, **kwargs)

        return attention

    for name in ("sdpa", "flex_attention"):
        function = recorded(name, ALL_ATTENTION_FUNCTIONS[name])
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, function)
    for model in ("llama", "gemma2", "gpt_oss"):
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        function = recorded("eager", module.eager_attention_forward)
        monkeypatch.setattr(module, "eager_attention_forward", function)
    return found


def tune(model: PreTrainedModel) -> None:
    recipe = AutoRoundModifier(
        iters=2,
        batch_size=8,
        ignore=["lm_head"],
        config_groups={"group_0": weight_scheme(4)},
        engine="none",  # gpt-oss, whose experts no engine reads one by one
    )
    quantize(model, recipe)
    assert len(recipe.block_reports) == 2


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_a_llama_is_tuned_in_sdpa_whatever_it_was_loaded_with(implementation, ran):
    model = llama(implementation)
    tune(model)
    assert set(ran[True]) == {"sdpa"}
    assert len(ran[True]) >= 2 * 2  # two blocks, two steps
    assert set(ran[False]) == {"eager", "sdpa"}  # calibration, held-out losses
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    ("name", "expected"), [("capped logits", "eager"), ("no cap", "sdpa"), ("sinks", "eager")]
)
def test_attention_that_sdpa_does_not_compute_stays_eager(name, expected, ran, tmp_path):
    kind, config = MODELS[name]
    kind(config).save_pretrained(tmp_path)
    tune(kind.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert set(ran[True]) == {expected}
