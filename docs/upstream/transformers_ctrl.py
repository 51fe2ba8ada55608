"""
Transformers 5.17: a quantized CTRL does not run.

After loading a quantized checkpoint its layer norms, in bfloat16, get hidden states in float32; its
table of positions is a plain tensor in float32. The original runs.
"""

import tempfile
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import CTRLConfig, CTRLLMHeadModel


def run(model: CTRLLMHeadModel) -> str:
    try:
        model(torch.arange(3, 9)[None])
    except RuntimeError as error:
        return str(error)
    return "runs"


folder = Path(tempfile.mkdtemp())
config = CTRLConfig(vocab_size=128, n_positions=32, n_embd=64, dff=64, n_layer=1, n_head=4)
CTRLLMHeadModel(config).to(torch.bfloat16).save_pretrained(folder / "original")
model = CTRLLMHeadModel.from_pretrained(folder / "original", dtype=torch.bfloat16)
print("original:", run(model))
weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
model = oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]))
model.save_pretrained(folder / "quantized", save_compressed=True)
loaded = CTRLLMHeadModel.from_pretrained(folder / "quantized", dtype=torch.bfloat16)
print("quantized:", run(loaded), "; expected: runs")
