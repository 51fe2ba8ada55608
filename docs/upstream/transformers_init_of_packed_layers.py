"""
Transformers 5.17: packed layers of some architectures stop the loading.

`_initialize_missing_keys` calls `_init_weights` for every module. That of Falcon, Mamba,
ModernBERT, SigLIP's attention and others reads `module.weight`, which a packed layer does not have;
so does `mark_tied_weights_as_initialized` for a packed head that is tied. Quantized embeddings fail
alike.
"""

import tempfile
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM


def load(model_class, config, targets: list[str]) -> str:
    folder = Path(tempfile.mkdtemp())
    model_class(config).to(torch.bfloat16).save_pretrained(folder / "original")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    model = oneshot(
        model=model_class.from_pretrained(folder / "original", dtype=torch.bfloat16),
        recipe=QuantizationModifier(
            config_groups={"group_0": {"targets": targets, "weights": weights}}, ignore=["lm_head"]
        ),
    )
    for module in model.modules():  # compressed-tensors would not pack classes derived from Linear
        if getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme.format = "pack-quantized"
    model.save_pretrained(folder / "quantized", save_compressed=True)
    try:
        model_class.from_pretrained(folder / "quantized")
    except AttributeError as error:
        return str(error)
    return "loaded"


SIZE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
print("layers of Falcon:", load(FalconForCausalLM, FalconConfig(**SIZE), ["Linear"]))
config = LlamaConfig(**SIZE, intermediate_size=64)
print("embeddings of Llama:", load(LlamaForCausalLM, config, ["Embedding"]))
print("expected: loaded")
