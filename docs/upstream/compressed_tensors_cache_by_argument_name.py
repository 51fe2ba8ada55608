"""
compressed-tensors 0.17 to 0.20 with Transformers 5.24: the key-value cache is not quantized.

compressed-tensors knows attention with a cache by an argument `past_key_values` of its forward
pass. Transformers 5.24 calls that argument `cache` in Llama and others. So an FP8 cache is read as
one of 16 bits, with no error: `k_scale` and `v_scale` of the file are listed as unexpected.
(compressed-tensors 0.17 makes these parameters, and its hook still sets the old argument.)
"""

import inspect
from importlib.metadata import version

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    apply_quantization_config,
)
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
)
model = LlamaForCausalLM(config).to(torch.bfloat16)
attention = model.model.layers[0].self_attn
ids = torch.arange(8)[None]
with torch.no_grad():
    before = model(ids).logits
cache = QuantizationArgs(num_bits=8, type="float", strategy="tensor", dynamic=False)
apply_quantization_config(model, QuantizationConfig(config_groups={}, kv_cache_scheme=cache))
for name, parameter in attention.named_parameters(recurse=False):
    if name.endswith("_scale"):
        torch.nn.init.constant_(parameter, 0.01)  # coarse enough to change what is computed
with torch.no_grad():
    after = model(ids).logits

print(f"Transformers {version('transformers')}, compressed-tensors {version('compressed-tensors')}")
print("arguments of attention:", *inspect.signature(attention.forward).parameters)
print("scales of the cache:", [x for x, _ in attention.named_parameters(recurse=False)])
print("the cache is quantized:", not torch.equal(before, after))
print("expected: ['k_scale', 'v_scale'] and True")
