"""
Transformers 5.23 and 5.24 refuse packed weights with zero points; 5.17 to 5.22 load them.

Transformers makes the compressed layers on the meta device before it loads them.
`PackedQuantizationCompressor.compress` of compressed-tensors 0.18 to 0.20 packs the weight there,
but not the zero point: the parameter has 128 rows, the tensor in the file 16. Up to 5.22
`core_model_loading.set_param_for_module` did not compare shapes where a model is quantized; since
5.23 it does, for each parameter that is not quantized while it is loaded. compressed-tensors 0.17,
which has no branch for the meta device, gives the right shape.
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
model = LlamaForCausalLM(config).to(torch.bfloat16)
weights = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False)
scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
quantization = QuantizationConfig(
    config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"]
)
apply_quantization_config(model, quantization)
for module in model.modules():
    if hasattr(module, "weight_zero_point"):
        torch.nn.init.constant_(module.weight_scale, 0.01)
        torch.nn.init.constant_(module.weight_zero_point, 3)
ModelCompressor(quantization_config=quantization).compress_model(model)
tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}

folder = Path(tempfile.mkdtemp())
config.quantization_config = {"quant_method": "compressed-tensors", **quantization.to_dict()}
config.save_pretrained(folder)
LlamaForCausalLM(LlamaConfig(**config.to_diff_dict())).save_pretrained(folder, state_dict=tensors)


def load(**options) -> str:
    try:
        LlamaForCausalLM.from_pretrained(folder, **options)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


print(f"Transformers {version('transformers')}, compressed-tensors {version('compressed-tensors')}")
print("as it is:", load())
print("unpacked:", load(quantization_config=CompressedTensorsConfig(dequantize=True)))
print("expected: loaded")
