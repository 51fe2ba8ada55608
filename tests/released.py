"""Checkpoints in the formats of releases: FP8 in blocks, MXFP4."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
WEIGHTS = "model.safetensors"
# The numbers of E2M1 in the order of their encodings
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(config))


def add_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    saved = load_file(folder / WEIGHTS) | dict(tensors)
    save_file(saved, folder / WEIGHTS, metadata={"format": "pt"})


def fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    :param weight: (rows, columns)
    :return: the weight in E4M3; one scale for each block of 128 by 128, smaller ones at the edges;
        and their product as float32
    """
    rows, columns = weight.shape
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    product = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1)))
            scales[i, j] = weight[block].abs().max() / 448
            stored[block] = (weight[block].float() / scales[i, j]).to(torch.float8_e4m3fn)
            product[block] = stored[block].float() * scales[i, j]
    return stored, scales, product


def store_in_fp8(folder: Path, is_linear: Callable[[str], bool]) -> dict[str, Tensor]:
    """
    Rewrite a checkpoint as DeepSeek-V3 is released.

    :param is_linear: whether the tensor of a name is the weight of a linear layer in FP8
    :return: what the weights in FP8 mean, in bfloat16
    """
    tensors, meant = load_file(folder / WEIGHTS), {}
    for name in [name for name in tensors if is_linear(name)]:
        tensors[name], tensors[f"{name}_scale_inv"], product = fp8_blocks(tensors[name])
        meant[name] = product.bfloat16()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    edit_config(folder, quantization_config=quantization)
    return meant


def store_experts_in_mxfp4(folder: Path) -> dict[str, Tensor]:
    """
    Rewrite a gpt-oss checkpoint as it is released: 32 numbers along the input features share a
    power of two, and two numbers share a byte.

    :return: what the weights mean, in bfloat16, (experts, input features, output features)
    """
    tensors, meant = load_file(folder / WEIGHTS), {}
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32, 32)
        codes = torch.randint(16, shape, generator=generator)
        exponents = torch.randint(118, 124, shape[:-1], generator=generator)
        numbers = torch.cat([E2M1, -E2M1])[codes] * torch.exp2(exponents[..., None] - 127.0)
        meant[name] = numbers.flatten(2).transpose(1, 2).bfloat16()
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = exponents.to(torch.uint8)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    edit_config(
        folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    )
    return meant
