"""
Transformers 5.17: quantized experts of some architectures cannot be loaded.

Mixtral, Qwen3-MoE and others have a conversion that joins experts which are stored one by one.
Granite-MoE, Granite 4, gpt-oss, Qwen3-VL-MoE and others are released with all experts in one tensor
and have none, so that experts which were quantized one by one are not read, and the model's are
random.
"""

import tempfile
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

folder = Path(tempfile.mkdtemp())
config = GraniteMoeConfig(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
)
GraniteMoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "original")
model = oneshot(
    model=GraniteMoeForCausalLM.from_pretrained(folder / "original", dtype=torch.bfloat16),
    recipe=QuantizationModifier(
        targets=["Linear"], ignore=["lm_head", "re:.*router.*"], scheme="W4A16"
    ),
)
model.save_pretrained(folder / "quantized", save_compressed=True)
_, info = GraniteMoeForCausalLM.from_pretrained(folder / "quantized", output_loading_info=True)
print("missing:", sorted(info["missing_keys"]), "; expected: none")
