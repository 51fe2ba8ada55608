"""The CPU kernel of auto-round (ARK), which is a package of its own: auto-round-lib."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoround_modifier.inference.packed_weight import PackedWeight

__all__ = ["ArkLinear"]


class ArkLinear(nn.Module):
    """
    Computes in float32, whatever the dtype of its input, with the exact weights.

    :param weight: on the CPU
    :param bias: (out_features,), or None
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None):
        super().__init__()
        import auto_round_kernel as kernel

        spec = weight.spec
        self.out_features, self.in_features = spec.out_features, spec.in_features
        self._multiply = kernel.woqgemm_linear
        zero_point = torch.empty(0, dtype=torch.int8)
        if weight.zero_point is not None:
            zero_point = weight.signed_zero_point().T.contiguous()
        self._layout: tuple[Any, ...] = (
            spec.features_per_scale,
            "auto",  # the dtype to compute in
            f"int{spec.num_bits}",
            "fp32",  # the dtype of scales
            weight.zero_point is not None,
        )
        packed = kernel.repack_quantized_weight(
            weight.signed().T.contiguous(),
            weight.scale.float().T.contiguous(),
            zero_point,
            *self._layout,
        )
        self.register_buffer("weight_packed", packed, persistent=False)
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        sizes = (self.out_features, self.in_features)
        return self._multiply(input, self.weight_packed, self.bias, *sizes, *self._layout)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
