"""
Transformers 5.17: all experts of a model are read by one config group.

`get_experts_scheme` (transformers/integrations/compressed_tensors.py) takes the first group with an
expression that has `experts` in it, else the first with the name of a class, else the first.
Experts of two blocks in two schemes, or experts whose group has no such expression, give an error
about a conversion, or other logits without a message.
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


def group(bits: int, target: str) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
    return {"targets": [target], "weights": {**weights, "group_size": 32}}


ATTENTION, MLP = r"re:.*self_attn\..*_proj$", r"re:.*mlp\..*_proj$"
for name, groups in (
    ("attention 4 bits, experts 2 bits", {"a": group(4, ATTENTION), "b": group(2, MLP)}),
    (
        "experts of block 0 in 4 bits, others in 2 bits",
        {"a": group(4, r"re:.*layers\.0\.mlp\.experts\..*_proj$"), "b": group(2, "Linear")},
    ),
):
    modifier = QuantizationModifier(config_groups=groups, ignore=["lm_head", "re:.*mlp.gate$"])
    print(f"{name}: {difference(modifier)}; expected: 0.000")
