"""vLLM linear kernels for other formats than packed integers, on any CPU.

vLLM has CPU kernels for INT8 and FP8 with quantized activations only. These read the tensors that
its loader made of a checkpoint, dequantize the weight once, and multiply; activations are quantized
by compressed-tensors. How codes and scales are laid out is taken from vLLM's own helpers. For tests
and small models, not for speed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch.nn.functional import linear
from vllm import _custom_ops
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mxfp4 import MxFp4LinearKernel
from vllm.model_executor.kernels.linear.mxfp8 import Mxfp8LinearKernel
from vllm.model_executor.kernels.linear.nvfp4 import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.scaled_mm import (
    Fp8BlockScaledMMLinearKernel,
    FP8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w4a4_nvfp4 as nvfp4_scheme,
)
from vllm.model_executor.layers.quantization.utils.mxfp8_utils import dequant_mxfp8_to_bf16
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    break_fp4_bytes,
    dequantize_to_dtype,
)
from vllm.platforms import PlatformEnum

MX_GROUP = 32
NVFP4_GROUP = 16
E8M0_BIAS = 127
E4M3_MAX = 448.0


class Dequantizing(ABC):
    """
    What the kernels have in common.

    :cvar activations: how the checkpoint that is served quantizes them, as a dict of
        `QuantizationArgs`; not all of vLLM's schemes tell their kernel
    """

    activations: ClassVar[dict | None] = None

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: object) -> tuple[bool, str | None]:
        return True, None

    @abstractmethod
    def dequantized(self, layer: torch.nn.Module) -> torch.Tensor:
        """:return: (out_features, in_features)"""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight = self.dequantized(layer).bfloat16()
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.activations is not None:
            args = QuantizationArgs(**self.activations)
            global_scale = getattr(layer, "input_global_scale_inv", None)
            # By token and group: a leading dimension, or the tokens would be taken for one.
            batch = x.unsqueeze(0)
            scale, zero_point = getattr(layer, "input_scale", None), None
            if args.dynamic:
                scale, zero_point = compute_dynamic_scales_and_zp(batch, args, layer, global_scale)
            x = fake_quantize(batch, scale, zero_point, args, global_scale=global_scale)[0]
            x = x.to(layer.weight.dtype)
        return linear(x, layer.weight, bias)

    def apply_scaled_mm(self, *args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("`apply_weights` does all")

    apply_block_scaled_mm = apply_scaled_mm


class DequantizingMxfp4(Dequantizing, MxFp4LinearKernel):
    def dequantized(self, layer: torch.nn.Module) -> torch.Tensor:
        values = break_fp4_bytes(layer.weight, torch.float32)
        scale = torch.exp2(layer.weight_scale.float() - E8M0_BIAS)
        return values * scale.repeat_interleave(MX_GROUP, dim=1)


class DequantizingMxfp8(Dequantizing, Mxfp8LinearKernel):
    def dequantized(self, layer: torch.nn.Module) -> torch.Tensor:
        return dequant_mxfp8_to_bf16(layer.weight, layer.weight_scale)


class DequantizingNvfp4(Dequantizing, NvFp4LinearKernel):
    def dequantized(self, layer: torch.nn.Module) -> torch.Tensor:
        return dequantize_to_dtype(
            layer.weight.data,
            layer.weight_scale.data,
            layer.weight_global_scale,
            torch.bfloat16,
            NVFP4_GROUP,
            swizzle=False,
        )


class DequantizingFp8(Dequantizing, FP8ScaledMMLinearKernel):
    """FP8 by channel or tensor; the scheme hands the weight over as (in_features, out_features)."""

    def dequantized(self, layer: torch.nn.Module) -> torch.Tensor:
        return layer.weight.t().float() * layer.weight_scale.view(-1, 1)


class DequantizingFp8Block(Dequantizing, Fp8BlockScaledMMLinearKernel):
    def dequantized(self, layer: torch.nn.Module) -> torch.Tensor:
        rows, columns = layer.weight.shape
        block = self.weight_group_shape
        scale = layer.weight_scale.repeat_interleave(block.row, dim=0)[:rows]
        return layer.weight.float() * scale.repeat_interleave(block.col, dim=1)[:, :columns]


KERNELS = (
    DequantizingMxfp4,
    DequantizingMxfp8,
    DequantizingNvfp4,
    DequantizingFp8,
    DequantizingFp8Block,
)


def scaled_fp8_quant(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in for vLLM's operator, which its CPU build lacks."""
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX)
    return codes.to(torch.float8_e4m3fn), scale


def register() -> None:
    """Offer the kernels to vLLM, after its own: they get the layers that those refuse."""
    register_linear_kernel(DequantizingMxfp4, PlatformEnum.CPU, "mxfp4")
    register_linear_kernel(DequantizingMxfp8, PlatformEnum.CPU, "mxfp8")
    register_linear_kernel(DequantizingNvfp4, PlatformEnum.CPU, "nvfp4")
    register_linear_kernel(DequantizingFp8, PlatformEnum.CPU, "fp8")
    # The registry has no name for these two.
    kernels._POSSIBLE_WFP8A16_KERNELS[PlatformEnum.CPU].append(DequantizingFp8)
    kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(DequantizingFp8Block)

    # NVFP4 with 16-bit activations asks for a GPU kernel by name, without a look at the registry.
    choose = nvfp4_scheme.init_nvfp4_linear_kernel

    def init_nvfp4_linear_kernel(use_a16: bool = False) -> NvFp4LinearKernel:
        if use_a16:
            return DequantizingNvfp4(NvFp4LinearLayerConfig())
        return choose()

    nvfp4_scheme.init_nvfp4_linear_kernel = init_nvfp4_linear_kernel
    _custom_ops.scaled_fp8_quant = scaled_fp8_quant
