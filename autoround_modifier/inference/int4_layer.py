"""PyTorch's own kernel for 4-bit weights on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoround_modifier.inference.packed_weight import PackedWeight

__all__ = ["Int4Linear"]

OFFSET = 8  # the kernel computes (integer - 8) * scale + zero, with integers from 0 to 15


class Int4Linear(nn.Module):
    """
    Fewer than 4 bits are kept in 4: the difference of an integer and its zero point fits, so
    that nothing is rounded. With 4 bits and zero points, the kernel adds their product with the
    scale, which is rounded to bfloat16.

    :param weight: of at most 4 bits
    :param bias: (out_features,), or None
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None):
        super().__init__()
        spec = weight.spec
        self.out_features, self.in_features = spec.out_features, spec.in_features
        self.group_size = spec.features_per_scale
        scale = weight.scale.to(torch.bfloat16)
        integers, zero = weight.signed().to(torch.int32).add_(OFFSET), torch.zeros_like(scale)
        if weight.zero_point is not None:
            difference = weight.signed_zero_point().to(torch.int32)
            if spec.num_bits < 4:
                integers -= difference.repeat_interleave(self.group_size, dim=1)
            else:
                zero = (-difference.float() * scale.float()).to(torch.bfloat16)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        self.register_buffer("weight_packed", packed, persistent=False)
        scales = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("scales_and_zeros", scales, persistent=False)
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, self.in_features).contiguous()
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, self.weight_packed, self.group_size, self.scales_and_zeros
        )
        if self.bias is not None:
            result += self.bias
        return result.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
