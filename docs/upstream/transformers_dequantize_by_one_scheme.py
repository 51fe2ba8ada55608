"""
Transformers 5.23 and 5.24: with `dequantize=True` all layers are read by the first config group.

`CompressedTensorsDequantize` takes the scheme of `get_dense_scheme`: the first config group whose
targets do not name experts, whatever layer is loaded. Layers of another group are decompressed with
its bits: wrong weights without an error where shapes happen to fit, here W4 and W8 by channel.
Without `dequantize` the checkpoint is read as it is meant.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from transformers import CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
)


def scheme(target: str, num_bits: int) -> QuantizationScheme:
    weights = QuantizationArgs(num_bits=num_bits, strategy="channel", symmetric=True)
    return QuantizationScheme(targets=[target], weights=weights, format="pack-quantized")


model = LlamaForCausalLM(config).to(torch.bfloat16)
quantization = QuantizationConfig(
    config_groups={"group_0": scheme("re:.*self_attn.*", 4), "group_1": scheme("re:.*mlp.*", 8)},
    format="pack-quantized",
    ignore=["lm_head"],
)
apply_quantization_config(model, quantization)
for module in model.modules():
    if hasattr(module, "weight_scale"):
        torch.nn.init.constant_(module.weight_scale, 0.01)
ModelCompressor(quantization_config=quantization).compress_model(model)
tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}

folder = Path(tempfile.mkdtemp())
config.quantization_config = {"quant_method": "compressed-tensors", **quantization.to_dict()}
config.save_pretrained(folder)
LlamaForCausalLM(LlamaConfig(**config.to_diff_dict())).save_pretrained(folder, state_dict=tensors)


def logits(**options) -> torch.Tensor | str:
    try:
        loaded = LlamaForCausalLM.from_pretrained(folder, **options)
        with torch.no_grad():
            return loaded(torch.arange(8)[None]).logits
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


as_it_is = logits()
dequantized = logits(quantization_config=CompressedTensorsConfig(dequantize=True))
print(f"Transformers {version('transformers')}, compressed-tensors {version('compressed-tensors')}")
if isinstance(dequantized, str):
    print("with dequantize:", dequantized)
else:
    gap = float((as_it_is - dequantized).abs().max())
    print(f"logits differ by {gap:.3g}, of up to {float(as_it_is.abs().max()):.3g}")
print("expected: logits differ by 0")
