"""Reads integers back: from a module in memory and from a saved checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import quantize
from safetensors import safe_open
from torch import Tensor, nn


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }


def integers(module: nn.Module) -> Tensor:
    """The integers the library will pack for this module."""
    args = module.quantization_scheme.weights
    return quantize(
        module.weight, module.weight_scale, module.weight_zero_point, args, dtype=torch.int8
    )


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def saved_integers(tensors: dict[str, Tensor], name: str, num_bits: int) -> Tensor:
    shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
    return unpack_from_int32(tensors[f"{name}.weight_packed"], num_bits, shape)


def saved_zero_points(tensors: dict[str, Tensor], name: str, num_bits: int) -> Tensor:
    scale = tensors[f"{name}.weight_scale"]
    return unpack_from_int32(
        tensors[f"{name}.weight_zero_point"], num_bits, scale.shape, packed_dim=0
    )
