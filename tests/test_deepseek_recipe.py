"""The recipe for DeepSeek-R1 on a tiny model of its architecture, tuned, saved, and foretold."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from conftest import ROOT, quantize, tiny_tokenizer
from helpers import quantized_layers, saved_integers, saved_tensors
from llmcompressor.modeling.moe.linearize import linearize_moe
from tiny_mixtures import DEEPSEEK
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from autoround_modifier import load_recipe
from autoround_modifier.planning import plan

sys.path.insert(0, str(ROOT / "benchmarks"))
from released_configs import DEEPSEEK_R1, configuration

RECIPE = "deepseek_r1_int2_mixed"
EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "original"
    DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return linearize_moe(DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


def test_routed_experts_get_two_bits_and_all_else_four(model, written, tmp_path):
    recipe = load_recipe(RECIPE, iters=2, batch_size=4, min_expert_tokens=1)
    folder = tmp_path / "quantized"
    quantize(model, recipe, output_dir=folder)
    (modifier,) = recipe.modifiers
    assert len(modifier.block_reports) == 2
    assert all(report.scarce_experts == 0 for report in modifier.block_reports)

    layers = quantized_layers(model)
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    expected = {f"model.layers.{i}.self_attn.{x}": 4 for i in range(2) for x in attention}
    expected |= {f"model.layers.0.mlp.{x}": 4 for x in mlp}
    expected |= {f"model.layers.1.mlp.shared_experts.{x}": 4 for x in mlp}
    expected |= {f"model.layers.1.mlp.experts.{i}.{x}": 2 for i in range(4) for x in mlp}
    found = {name: layer.quantization_scheme.weights for name, layer in layers.items()}
    assert {name: weights.num_bits for name, weights in found.items()} == expected
    assert {weights.group_size for weights in found.values()} == {128}
    assert {name for name, bits in expected.items() if bits == 2} == set(
        filter(EXPERT.fullmatch, layers)
    )

    tensors = saved_tensors(folder)
    for name, layer in layers.items():
        saved = saved_integers(tensors, name, expected[name])
        assert torch.equal(saved, written[layer][0].values), name
    for name in ("lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"):
        assert tensors[f"{name}.weight"].dtype == torch.bfloat16

    foretold = plan(DeepseekV3Config(**DEEPSEEK), RECIPE)
    assert foretold.checkpoint.value == sum(x.nbytes for x in tensors.values())


def test_the_configuration_is_that_of_r1():
    found, defaults = configuration(DEEPSEEK_R1).to_dict(), DeepseekV3Config().to_dict()
    shapes = DEEPSEEK_R1.keys() & defaults.keys() - {"dtype", "quantization_config"}
    assert {name: found[name] for name in shapes} == {name: defaults[name] for name in shapes}
    assert len(shapes) > 18
