"""Tiny models, recipes and runs of the tests on an accelerator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from conftest import VOCABULARY, quantize, tiny_llama, token_samples, weight_scheme
from helpers import quantized_layers
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from autoround_modifier import AutoRoundModifier
from autoround_modifier.host.quantized_weights import read_layer

__all__ = ["RECIPES", "chosen_device", "codes", "dense", "mixture", "run"]

HIDDEN = 128
RECIPES: dict[str, dict[str, Any]] = {
    "W2": {"config_groups": {"group_0": weight_scheme(2)}},
    "W4 asymmetric": {"config_groups": {"group_0": weight_scheme(4, symmetric=False)}},
    "W8A8": {"scheme": "W8A8"},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
    "NVFP4": {"scheme": "NVFP4"},
}


def chosen_device() -> torch.device:
    """
    :return: the accelerator; what the environment variable ``GPU_TESTS_DEVICE`` names, for a trial
        on the CPU
    :raises RuntimeError: if there is neither
    """
    named = os.environ.get("GPU_TESTS_DEVICE")
    if named:
        return torch.device(named)
    if not torch.accelerator.is_available():
        raise RuntimeError(
            "tests marked `gpu` need an accelerator, and PyTorch finds none; for a trial on the "
            "CPU set GPU_TESTS_DEVICE=cpu"
        )
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, 0)


def dense(device: torch.device | str, num_layers: int = 2) -> PreTrainedModel:
    """:return: a random Llama in bfloat16, loaded from the disk on the CPU and moved from there"""
    return tiny_llama(num_layers=num_layers, hidden_size=HIDDEN).to(device)


def mixture(device: torch.device | str, folder: Path) -> PreTrainedModel:
    """
    :param folder: where the model is written first
    :return: a random Qwen3-MoE in bfloat16: two blocks, four experts, two for each token
    """
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return linearize_moe(model).to(device)


def run(model: PreTrainedModel, recipe: str, **fields: Any) -> PreTrainedModel:
    """
    `oneshot` with a few steps.

    :param recipe: one of `RECIPES`
    :param fields: of `AutoRoundModifier`, in place of those here
    """
    fields = {"iters": 6, "batch_size": 4, "min_expert_tokens": 1, **RECIPES[recipe], **fields}
    return quantize(model, AutoRoundModifier(ignore=["lm_head"], **fields), token_samples(16, 24))


def codes(model: PreTrainedModel) -> dict[str, Tensor]:
    """:return: of each quantized layer, the integers or numbers that saving it writes, float32"""
    return {
        name: read_layer(layer, layer.quantization_scheme.weights).values.float().cpu()
        for name, layer in quantized_layers(model).items()
    }
