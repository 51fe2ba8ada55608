"""AutoRound beside the other modifiers of LLM-Compressor, in one recipe."""

from __future__ import annotations

import pytest
import torch
from conftest import quantize, tiny_llama, token_samples
from helpers import integers, quantized_layers, saved_integers, saved_tensors
from transformers import AutoModelForCausalLM

from autoround_modifier.evaluation import compare

SMOOTHQUANT = """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.5
    AutoRoundModifier:
      iters: 6
      batch_size: 4
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 32}
"""

AWQ = SMOOTHQUANT.replace("SmoothQuantModifier:\n      smoothing_strength: 0.5", "AWQModifier: {}")

GPTQ = """
quant_stage:
  gptq_modifiers:
    GPTQModifier:
      config_groups:
        attention:
          targets: ["re:.*self_attn.*_proj$"]
          weights: {num_bits: 8, type: int, symmetric: true, strategy: group, group_size: 32}
  autoround_modifiers:
    AutoRoundModifier:
      iters: 6
      batch_size: 4
      config_groups:
        mlp:
          targets: ["re:.*mlp.*_proj$"]
          weights: {num_bits: 3, type: int, symmetric: false, strategy: group, group_size: 32}
"""


def gptq_last() -> str:
    """The same two modifiers in the other order."""
    head, rest = GPTQ.split("  gptq_modifiers:")
    gptq, autoround = rest.split("  autoround_modifiers:")
    return f"{head}  autoround_modifiers:{autoround}  gptq_modifiers:{gptq}"


RECIPES = {"smoothquant": SMOOTHQUANT, "awq": AWQ, "gptq": GPTQ, "gptq last": gptq_last()}


@pytest.mark.parametrize("name", RECIPES)
def test_runs_saves_and_reloads(name, tmp_path):
    model = quantize(tiny_llama(), RECIPES[name])
    layers = quantized_layers(model)
    assert len(layers) == 14
    ids = torch.tensor(token_samples(4, 12, seed=99)["input_ids"])
    assert compare(tiny_llama(), model, ids).kl < 3.0  # of the same model, not of noise
    expected = model(ids).logits
    before = {name: integers(module) for name, module in layers.items()}

    model.save_pretrained(tmp_path, save_compressed=True)
    tensors = saved_tensors(tmp_path)
    for layer, values in before.items():
        num_bits = layers[layer].quantization_scheme.weights.num_bits
        assert torch.equal(saved_integers(tensors, layer, num_bits), values)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(ids).logits, expected, rtol=0, atol=2e-2)


def test_each_modifier_keeps_to_its_layers():
    model = quantize(tiny_llama(), GPTQ)
    for name, module in quantized_layers(model).items():
        args = module.quantization_scheme.weights
        assert (args.num_bits, args.symmetric) == ((8, True) if "attn" in name else (3, False))
