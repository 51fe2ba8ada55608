"""Ask vLLM which kernel it would choose for a layer, without starting an engine."""

from __future__ import annotations

import os
from unittest import mock

import torch
from dequantizing_kernel import DequantizingLinearKernel
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)

SHAPE = (576, 1536)  # in, out


def scheme(config_group: dict) -> CompressedTensorsWNA16:
    """:return: vLLM's scheme for a config group of integer weights"""
    names = ("strategy", "num_bits", "group_size", "symmetric")
    return CompressedTensorsWNA16(**{name: config_group["weights"][name] for name in names})


def choose(config_group: dict, shape: tuple[int, int] = SHAPE) -> str:
    """
    :param shape: input and output features
    :return: class name of the kernel among vLLM's own
    :raises ValueError: by vLLM, with each kernel's reason, if all of them refuse
    """
    of_vllm = scheme(config_group)
    config = MPLinearLayerConfig(
        full_weight_shape=shape,
        partition_weight_shape=shape,
        weight_type=of_vllm.quant_type,
        act_type=torch.bfloat16,
        group_size=of_vllm.group_size,
        zero_points=not of_vllm.symmetric,
    )
    ours = {"VLLM_DISABLED_KERNELS": DequantizingLinearKernel.__name__}
    with mock.patch.dict(os.environ, ours):
        return choose_mp_linear_kernel(config).__name__


def own_kernel(config_group: dict) -> str | None:
    """:return: class name of the kernel among vLLM's own, or None if all of them refuse"""
    try:
        return choose(config_group)
    except ValueError:
        return None
