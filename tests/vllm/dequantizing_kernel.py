"""A vLLM linear kernel for 2 to 8 bit weights on any CPU: dequantize once, then multiply.

vLLM's own CPU kernels take 4-bit weights only; the widths between are for its GPU kernels. This
one reads the same loaded tensors, so the engine serves the unchanged checkpoint. It keeps the
dequantized weight in memory: it is for tests and small models, not for speed.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, pad
from vllm.model_executor.kernels.linear import (
    MPLinearKernel,
    MPLinearLayerConfig,
    register_linear_kernel,
)
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.platforms import PlatformEnum


def unpack(packed: torch.Tensor, num_bits: int, size: int) -> torch.Tensor:
    """
    Read densely packed unsigned integers: element i is the `num_bits` bits from bit i * num_bits
    on, least significant first, and may straddle two words.

    :param packed: int32, shape [rows, ceil(size * num_bits / 32)]
    :param size: how many elements a row holds
    :return: int64, shape [rows, size]
    """
    words = pad(packed.long() & 0xFFFFFFFF, (0, 1))
    first_bit = torch.arange(size) * num_bits
    word, offset = first_bit // 32, first_bit % 32
    two_words = words[:, word] | words[:, word + 1] << 32
    return two_words >> offset & (1 << num_bits) - 1


class DequantizingLinearKernel(MPLinearKernel):
    """Weight-only integers, per group or per output channel, symmetric or asymmetric."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type.is_floating_point() or c.weight_type.size_bits > 8:
            return False, f"weights of {c.weight_type} are not integers of at most 8 bits"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed, scale, zero_point = self._get_weight_params(layer)
        in_features, out_features = self.config.partition_weight_shape
        num_bits = self.config.weight_type.size_bits

        weight = unpack(packed.data, num_bits, in_features)  # [out, in]
        if self.config.zero_points:  # packed along the output dimension
            offset = unpack(zero_point.data.t(), num_bits, out_features).t()  # [out, groups]
        else:
            offset = torch.full_like(scale, self.config.weight_type.bias, dtype=torch.int64)

        grouped = weight.view(*scale.shape, -1)  # [out, groups, group_size]
        weight = (grouped - offset[..., None]).to(scale.dtype) * scale.data[..., None]
        replace_parameter(layer, self.w_q_name, weight.view(out_features, in_features))

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return linear(x, getattr(layer, self.w_q_name), bias)


def register() -> None:
    """Offer the kernel to vLLM, after its own: it gets the layers that they refuse."""
    register_linear_kernel(DequantizingLinearKernel, PlatformEnum.CPU, "mp")
