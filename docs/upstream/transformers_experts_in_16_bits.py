"""
Transformers 5.17: experts in 16 bits beside quantized layers are random after loading.

`update_weight_conversions` of the compressed-tensors quantizer lets the conversion of experts look
for `weight_packed` only, also where `ignore` names the experts.
"""

import tempfile
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

CONFIG = Qwen3MoeConfig(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=128,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=4,
    num_experts_per_tok=2,
)
IDS = torch.arange(3, 27)[None]


def original(folder: Path):
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(CONFIG).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@torch.no_grad()
def difference(modifier: QuantizationModifier) -> str:
    """Quantize by LLM-Compressor's own rounding, save, load, compare the logits."""
    folder = Path(tempfile.mkdtemp())
    model = oneshot(model=original(folder / "original"), recipe=modifier)
    expected = model(IDS).logits.float()
    model.save_pretrained(folder / "quantized", save_compressed=True)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder / "quantized")
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"{float((loaded(IDS).logits - expected).norm() / expected.norm()):.3f}"


modifier = QuantizationModifier(
    targets=["Linear"], ignore=["lm_head", "re:.*mlp.*"], scheme="W4A16"
)
print(f"attention in 4 bits, experts in 16: {difference(modifier)}; expected: 0.000")
