"""host/empty_model.py: a model of a configuration alone is the one that is loaded."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from tiny_mixtures import DEEPSEEK, FIELDS, tiny_mixture
from transformers import DeepseekV3Config, Llama4Config, LlamaConfig

from autoround_modifier.errors import RecipeError
from autoround_modifier.host.empty_model import empty_model, split_experts


def shapes(model) -> dict[str, tuple]:
    return {name: (tuple(x.shape), x.dtype) for name, x in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
def test_names_shapes_and_dtypes_are_those_of_the_loaded_model(tied):
    model = tiny_llama(tied=tied)
    built = empty_model(model.config)
    assert shapes(built.model) == shapes(model)
    assert all(x.is_meta for x in built.model.state_dict().values())
    tensors = built.model.state_dict(keep_vars=True)
    assert (tensors["lm_head.weight"] is tensors["model.embed_tokens.weight"]) == tied


@pytest.mark.parametrize("prefix", FIELDS)
def test_one_expert_stands_for_all(prefix, tmp_path):
    model = tiny_mixture(tmp_path, prefix)
    assert shapes(empty_model(model.config, all_experts=True).model) == shapes(model)
    built = empty_model(model.config)
    assert set(built.num_experts.values()) == {4}
    numbers = sum(x.numel() * built.copies(name) for name, x in built.model.named_parameters())
    assert numbers == model.num_parameters()
    assert shapes(built.model).items() <= shapes(model).items()


def test_experts_of_one_block_are_split(tmp_path):
    model = tiny_mixture(tmp_path, split=False)
    with torch.device("meta"):
        model = type(model)(model.config)
    split_experts(model, lambda name: name == "model.layers.1.mlp.experts")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert first.gate_up_proj.ndim == 3
    assert second.num_experts == 4
    assert second[3].up_proj.weight.is_meta


def test_experts_of_llama_4():
    """Whose class LLM-Compressor makes of other arguments."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "intermediate_size_mlp": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "vocab_size": 128,
    }
    vision = {"num_hidden_layers": 1, "hidden_size": 64, "vision_output_dim": 64}
    built = empty_model(Llama4Config(text_config=text, vision_config=vision))
    (name, *_), count = built.num_experts, set(built.num_experts.values())
    assert count == {4}
    assert built.copies(f"{name}.0.up_proj") == 4
    assert built.model.get_submodule(f"{name}.0.up_proj").weight.shape == (64, 64)


def test_some_tensors_stay_in_float32():
    built = empty_model(DeepseekV3Config(**DEEPSEEK))
    kept = [name for name, x in built.model.state_dict().items() if x.dtype == torch.float32]
    assert kept == ["model.layers.1.mlp.gate.e_score_correction_bias"]


def test_a_config_that_gives_no_model_is_refused():
    with pytest.raises(RecipeError, match="cannot build a model"):
        empty_model(LlamaConfig(hidden_act="no_such_function"))
