"""Logits and weights of a model of Transformers, and the reference from the dequantized one."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

# Of a number rounded to a dtype, as a part of it; below `TINY`, of the steps of float16 there
HALF_A_STEP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = 2.0**-14


def token_ids(folder: Path) -> Tensor:
    """:return: of the row in ``folder``, (sequences, tokens)"""
    return load_file(folder / "reference.safetensors")["token_ids"]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """:return: (sequences, tokens, vocabulary), float32"""
    return model.eval()(ids).logits.float()


@lru_cache(maxsize=2)
def dense_logits(folder: Path) -> Tensor:
    """:return: of the dequantized model of a row, by this version of Transformers, in float32"""
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    return logits(model, token_ids(folder))


@lru_cache(maxsize=2)
def dense_weights(folder: Path) -> dict[str, Tensor]:
    """:return: weights of the linear layers of a row, dequantized, (out, in), float32"""
    tensors = load_file(folder / "dense" / "model.safetensors")
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith("_proj.weight")
    }


@torch.no_grad()
def weight_gap(model: nn.Module, folder: Path, dtype: torch.dtype) -> float:
    """
    Multiplies the identity by each layer: whatever it stores, the product is its transposed weight,
    and each sum has one term that is not zero.

    :param dtype: of the identity
    :return: the largest difference to the dequantized weight, as a part of that weight, or of
        `TINY`
    """
    worst = 0.0
    for name, weight in dense_weights(folder).items():
        identity = torch.eye(weight.shape[1], dtype=dtype)[None]
        found = model.get_submodule(name)(identity)[0].T.float()
        gap = ((found - weight).abs() / weight.abs().clamp_min(TINY)).max()
        worst = max(worst, float(gap))
    return worst


def kernels(model: nn.Module) -> list[str]:
    """:return: class names of the layers whose names end in ``_proj``, other than `nn.Linear`"""
    found = {
        type(module).__name__
        for name, module in model.named_modules()
        if name.endswith("_proj") and type(module) is not nn.Linear
    }
    return sorted(found)
