"""Packed experts on any CPU: dequantize once, then compute as vLLM computes unquantized ones.

vLLM has no CPU kernel for most packed experts ("No WNA16 MoE backend"). This method has vLLM's own
parameters, so its loader puts each tensor of the checkpoint in its place. For tests, not for speed.
"""

from __future__ import annotations

from typing import Any

import torch
from dequantizing_kernel import unpack
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as packed_experts,
)

OfVllm = packed_experts.CompressedTensorsWNA16MoEMethod


class DequantizingExperts(OfVllm):
    """Symmetric integers, by group."""

    def __init__(self, weight_quant: Any, input_quant: Any, moe: Any, **kwargs: Any) -> None:
        self.unquantized = UnquantizedFusedMoEMethod(moe)
        super().__init__(weight_quant, input_quant, moe, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        for name in ("w13", "w2"):
            weight = self.dequantized(
                getattr(layer, f"{name}_weight_packed"), getattr(layer, f"{name}_weight_scale")
            )
            layer.register_parameter(
                f"{name}_weight", torch.nn.Parameter(weight, requires_grad=False)
            )
        self.unquantized.process_weights_after_loading(layer)
        self.moe_kernel = self.unquantized.moe_kernel

    def dequantized(self, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """
        :param packed: shape [experts, out, in * bits / 32]
        :param scale: shape [experts, out, groups]
        :return: shape [experts, out, in]
        """
        experts, rows, groups = scale.shape
        columns = groups * self.group_size
        integers = unpack(packed.data.flatten(0, 1), self.num_bits, columns)
        centred = (integers - (1 << self.num_bits - 1)).to(scale.dtype)
        weight = centred.view(experts, rows, groups, -1) * scale.data[..., None]
        return weight.view(experts, rows, columns)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> Any:
        return self.unquantized.get_fused_moe_quant_config(layer)

    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.unquantized.apply(*args, **kwargs)

    def apply_monolithic(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.unquantized.apply_monolithic(*args, **kwargs)


# Some loaders ask for the method's name.
DequantizingExperts.__name__ = OfVllm.__name__


def register() -> None:
    """Give packed experts to this method, whatever kernels vLLM has."""

    def select(config: Any, *args: Any, **kwargs: Any) -> tuple[None, Any]:
        return None, UnquantizedFusedMoEMethod(config).experts_cls

    packed_experts.select_wna16_moe_backend = select
    packed_experts.CompressedTensorsWNA16MoEMethod = DequantizingExperts
