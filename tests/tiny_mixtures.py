"""Tiny mixtures of experts with random weights, loaded as users load theirs."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from conftest import VOCABULARY
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import PreTrainedModel

__all__ = ["DEEPSEEK", "FIELDS", "tiny_mixture"]

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
# Beside `COMMON`, by the prefix of the classes
FIELDS = {
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 128, "head_dim": 32},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 128},
    "Mixtral": {"num_local_experts": 4},
    "MiniMaxM2": {"num_local_experts": 4, "head_dim": 32},
    "Phimoe": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 32, "sliding_window": 8},
    "GraniteMoe": {"num_local_experts": 4},
}

# Of DeepSeek-V3; groups of 128 divide the input features of every linear layer
DEEPSEEK = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 64,
}


def tiny_mixture(
    folder: Path,
    prefix: str = "Qwen3Moe",
    split: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    **fields: int,
) -> PreTrainedModel:
    """
    :param folder: where the model is written first
    :param prefix: of the names of Transformers' classes
    :param split: give each expert linear layers of its own, as `oneshot` does
    :param fields: of the configuration, in place of those here
    :return: a model with random weights
    """
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **FIELDS[prefix], **fields})
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    model = model_class.from_pretrained(folder, dtype=dtype)
    return linearize_moe(model) if split else model
