"""host/shared_state.py: models whose blocks share keys and values."""

from __future__ import annotations

import llmcompressor
import pytest
import torch
import transformers
from conftest import tiny_llama, tiny_tokenizer, token_samples, weight_scheme
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.pipelines import CalibrationPipeline
from test_resume_passed_state import gemma3n

from autoround_modifier.host.shared_state import (
    SHARED_STATE_PIPELINE,
    blocks_share_state,
    config_shares_state,
)


@pytest.mark.parametrize("prefix", ["Gemma3n", "Gemma4", "Gemma4Unified"])
@pytest.mark.parametrize("shared", [0, 2])
def test_models_that_share(prefix, shared):
    config = getattr(transformers, f"{prefix}TextConfig")(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=32,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=shared,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    assert blocks_share_state(model) == config_shares_state(config) == bool(shared)
    assert not blocks_share_state(tiny_llama())
    assert not config_shares_state(tiny_llama().config)


def test_the_sequential_pipeline_drops_what_is_shared(tmp_path):
    """If this passes no longer, the other pipeline is no longer needed."""
    assert SHARED_STATE_PIPELINE in CalibrationPipeline.registered_names()
    scheme = {"group_0": weight_scheme(targets=("re:.*mlp.*_proj$",))}
    with pytest.raises((KeyError, RuntimeError)):
        llmcompressor.oneshot(
            model=gemma3n(tmp_path / "model"),
            recipe=GPTQModifier(config_groups=scheme),
            dataset=token_samples(2),
            processor=tiny_tokenizer(),
        )
