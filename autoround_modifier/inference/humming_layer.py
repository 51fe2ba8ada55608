"""
Humming's kernels for NVIDIA GPUs, which take the tensors of a checkpoint as they are.

Written from the source of humming-kernels 0.1.12 (`humming.layer`, `humming.schema`); not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoround_modifier.exports.bit_stream import pack_rows
from autoround_modifier.inference.packed_weight import CHANNEL, PackedWeight

__all__ = ["HummingLinear"]

# Its kernels assert these; it adds what is missing.
PADDED = {"pad_n_to_multiple": 64, "pad_k_to_multiple": 32}


class HummingLinear(nn.Module):
    """
    :param weight: on a GPU
    :param bias: (out_features,), or None
    :param dtype: to compute in: float16 or bfloat16
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        from humming.layer import HummingLayer

        spec = weight.spec
        self.out_features, self.in_features = spec.out_features, spec.in_features
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "type": "int",
            "num_bits": spec.num_bits,
            "strategy": "channel" if spec.group_size == CHANNEL else "group",
            "symmetric": spec.symmetric,
            "group_size": None if spec.group_size == CHANNEL else spec.group_size,
        }
        self.layer = HummingLayer(
            shape_n=spec.out_features,
            shape_k=spec.in_features,
            weight_config=config,
            has_bias=bias is not None,
            torch_dtype=dtype,
            **PADDED,
        )
        tensors = {
            "weight_packed": weight.packed,
            "weight_scale": weight.scale.to(dtype),
            "weight_shape": torch.tensor([spec.out_features, spec.in_features]),
        }
        if weight.zero_point is not None:  # packed along the rows, as in the file
            codes = weight.zero_point.T.to(torch.uint8).cpu().contiguous()
            tensors["weight_zero_point"] = pack_rows(codes, spec.num_bits).T.contiguous()
        if bias is not None:
            tensors["bias"] = bias.to(dtype)
        self.layer.load_from_tensors(tensors)
        self.layer.to(weight.packed.device)
        self.layer.transform()

    def forward(self, input: Tensor) -> Tensor:
        result = self.layer(input.reshape(-1, self.in_features))
        return result[..., : self.out_features].view(*input.shape[:-1], self.out_features)
