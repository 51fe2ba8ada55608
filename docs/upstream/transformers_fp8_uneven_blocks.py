"""
Transformers 5.17: weights in FP8 that blocks of 128 do not divide get wrong scales.

`Fp8Dequantize` takes rows / number of scales as the size of a block: 192 rows with 2 scales become
blocks of 96 rows, not of 128 and 64. Where the division has a remainder (576 rows with 5 scales, as
`kv_a_proj_with_mqa` of DeepSeek-V3 has) loading fails. `weight_block_size` of the config says what
is right.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

folder = Path(tempfile.mkdtemp())
config = LlamaConfig(
    vocab_size=16,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=1,
    num_attention_heads=4,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)

name = "model.layers.0.mlp.up_proj.weight"  # 192 rows: a block of 128 and one of 64
tensors = load_file(folder / "model.safetensors")
for key in [key for key in tensors if key.endswith("_proj.weight")]:
    rows, columns = tensors[key].shape
    tensors[key] = torch.ones(rows, columns).to(torch.float8_e4m3fn)
    tensors[f"{key}_scale_inv"] = torch.ones(-(-rows // 128), -(-columns // 128))
tensors[f"{name}_scale_inv"] = torch.tensor([[1.0], [2.0]])
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
fields = json.loads((folder / "config.json").read_text())
fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
(folder / "config.json").write_text(json.dumps(fields))

model = AutoModelForCausalLM.from_pretrained(
    folder, quantization_config=FineGrainedFP8Config(dequantize=True)
)
weight = model.get_parameter(name)
print("rows with scale 1:", int((weight[:, 0] == 1).sum()), "; expected: 128")
