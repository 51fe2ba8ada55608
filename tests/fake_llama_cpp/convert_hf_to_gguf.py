"""
Converts a Llama or a Qwen3-MoE to GGUF as llama.cpp's converter of this name does: its arguments,
names, keys, the order of rows of Llama's queries and keys, and experts in one tensor. There is no
vocabulary in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--outfile", type=Path)
parser.add_argument("--outtype", choices=("f32", "f16", "bf16"))
arguments = parser.parse_args()

config = json.loads((arguments.model / "config.json").read_text())
architectures = {"LlamaForCausalLM": "llama", "Qwen3MoeForCausalLM": "qwen3moe"}
architecture = architectures.get(config["architectures"][0])
if architecture is None:
    raise SystemExit(f"Model {config['architectures'][0]} is not supported")
assert "quantization_config" not in config
tensors = {}
for file in sorted(arguments.model.glob("*.safetensors")):
    tensors |= load_file(file)

writer = gguf.GGUFWriter(arguments.outfile, architecture)
experts = sorted(
    (name for name in tensors if ".experts." in name),
    key=lambda name: int(name.split(".experts.")[1].split(".")[0]),
)
for name in experts:
    before, after = name.split(".experts.")
    stack = f"{before}.experts.{after.split('.', 1)[1]}"
    tensors.setdefault(stack, []).append(tensors.pop(name))
tensors = {k: torch.stack(x) if isinstance(x, list) else x for k, x in tensors.items()}

layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
groups = config["num_key_value_heads"]
writer.add_block_count(layers)
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(groups)
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
writer.add_vocab_size(config["vocab_size"])
writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
writer.add_tokenizer_model("none")
writer.add_array("test.words", ["one", "", "three"])
writer.add_array("test.numbers", [1.5, 2.5])
known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
names = gguf.get_tensor_name_map(known[architecture], layers)
numbers = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
for name, tensor in tensors.items():
    for part, count in (("q_proj.weight", heads), ("k_proj.weight", groups)):
        if architecture == "llama" and name.endswith(part):
            halves = tensor.reshape(count, 2, len(tensor) // count // 2, -1)
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    known = names.get_name(name, try_suffixes=(".weight",))
    if tensor.ndim < 2:
        writer.add_tensor(known, tensor.float().numpy())
        continue
    tensor = tensor.to(numbers[arguments.outtype]).contiguous()
    kind = gguf.GGMLQuantizationType[arguments.outtype.upper()]
    if kind == gguf.GGMLQuantizationType.BF16:
        writer.add_tensor(known, tensor.view(torch.uint8).numpy(), raw_dtype=kind)
    else:
        writer.add_tensor(known, tensor.numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
