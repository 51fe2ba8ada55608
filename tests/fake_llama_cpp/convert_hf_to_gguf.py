"""
Converts a Llama or a Qwen3-MoE to GGUF as llama.cpp's converter of this name does: its arguments,
its functions that are called from outside, names, keys, the order of rows of Llama's queries and
keys, and experts in one tensor. Its vocabulary is "none".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3MoeForCausalLM": "qwen3moe"}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class ModelBase:
    """
    :param folder: of the checkpoint
    :param output: file to write
    :param kind: key of `DTYPES`, of matrices
    """

    def __init__(self, folder: Path, output: Path, kind: str):
        self.config = json.loads((folder / "config.json").read_text())
        self.architecture = ARCHITECTURES.get(self.config["architectures"][0])
        if self.architecture is None:
            raise SystemExit(f"Model {self.config['architectures'][0]} is not supported")
        assert "quantization_config" not in self.config
        self.folder, self.kind = folder, kind
        self.gguf_writer = gguf.GGUFWriter(output, self.architecture)

    def tensors(self) -> dict[str, Tensor]:
        """:return: by name, with experts stacked, and rows of Llama's queries and keys in order"""
        tensors = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            tensors |= load_file(file)
        experts = sorted(
            (name for name in tensors if ".experts." in name),
            key=lambda name: int(name.split(".experts.")[1].split(".")[0]),
        )
        for name in experts:
            before, after = name.split(".experts.")
            stack = f"{before}.experts.{after.split('.', 1)[1]}"
            tensors.setdefault(stack, []).append(tensors.pop(name))
        tensors = {k: torch.stack(x) if isinstance(x, list) else x for k, x in tensors.items()}
        if self.architecture == "llama":
            heads = {
                "q_proj.weight": self.config["num_attention_heads"],
                "k_proj.weight": self.config["num_key_value_heads"],
            }
            for name, tensor in tensors.items():
                for part, count in heads.items():
                    if name.endswith(part):
                        halves = tensor.reshape(count, 2, len(tensor) // count // 2, -1)
                        tensors[name] = halves.swapaxes(1, 2).reshape(tensor.shape)
        return tensors

    def prepare_tensors(self) -> None:
        known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        blocks = self.config["num_hidden_layers"]
        names = gguf.get_tensor_name_map(known[self.architecture], blocks)
        for name, tensor in self.tensors().items():
            found = names.get_name(name, try_suffixes=(".weight",))
            if tensor.ndim < 2:
                self.gguf_writer.add_tensor(found, tensor.float().numpy())
                continue
            tensor = tensor.to(DTYPES[self.kind]).contiguous()
            kind = gguf.GGMLQuantizationType[self.kind.upper()]
            if kind == gguf.GGMLQuantizationType.BF16:
                numbers = tensor.view(torch.uint8).numpy()
                self.gguf_writer.add_tensor(found, numbers, raw_dtype=kind)
            else:
                self.gguf_writer.add_tensor(found, tensor.numpy())

    def set_vocab(self) -> None:
        self.gguf_writer.add_tokenizer_model("none")

    def prepare_metadata(self, vocab_only: bool) -> None:
        config, writer = self.config, self.gguf_writer
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
        writer.add_array("test.words", ["one", "", "three"])
        writer.add_array("test.numbers", [1.5, 2.5])
        self.set_vocab()

    def write(self) -> None:
        self.prepare_tensors()
        self.prepare_metadata(vocab_only=False)
        self.gguf_writer.write_header_to_file()
        self.gguf_writer.write_kv_data_to_file()
        self.gguf_writer.write_tensors_to_file()
        self.gguf_writer.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype", choices=DTYPES)
    arguments = parser.parse_args()
    ModelBase(arguments.model, arguments.outfile, arguments.outtype).write()


if __name__ == "__main__":
    main()
