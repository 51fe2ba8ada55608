"""How vLLM reads packed integers, and which widths its own CPU kernels take. No engine."""

from __future__ import annotations

import platform

import pytest
import torch
from dequantizing_kernel import unpack
from kernel_choice import choose, scheme
from rows import FP8_TOKEN, INT8_TOKEN, group
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    pack_quantized_values_into_int32,
    unpack_quantized_values_into_int32,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.scalar_type import scalar_types


def test_unpack_2_bits_literal() -> None:
    packed = torch.tensor([[0b11_10_01_00]], dtype=torch.int32)
    assert unpack(packed, 2, 5).tolist() == [[0, 1, 2, 3, 0]]


def test_unpack_3_bits_across_two_words() -> None:
    """Element 10 has its two low bits on top of word 0 and its high bit at the bottom of word 1."""
    packed = torch.tensor([[-(1 << 31), 0b010_1]], dtype=torch.int32)
    assert unpack(packed, 3, 12).tolist() == [[0] * 10 + [0b110, 0b010]]


@pytest.mark.parametrize(
    "weight_type", [scalar_types.uint2b2, scalar_types.uint4b8, scalar_types.uint8b128], ids=str
)
def test_unpack_equals_vllm_for_widths_that_divide_a_word(weight_type) -> None:
    values = torch.arange(4 * 64).view(4, 64).int() % (1 << weight_type.size_bits)
    packed = pack_quantized_values_into_int32(values, weight_type, packed_dim=1)
    assert torch.equal(unpack(packed, weight_type.size_bits, 64).int(), values)
    assert torch.equal(unpack_quantized_values_into_int32(packed, weight_type, 1), values)


def test_vllm_helper_does_not_read_3_bit_checkpoints() -> None:
    """It takes 32 // 3 = 10 elements a word, where scheme and checkpoint have 32 in 3 words."""
    packed = torch.zeros(4, 64 * 3 // 32, dtype=torch.int32)
    assert unpack(packed, 3, 64).shape == (4, 64)
    assert unpack_quantized_values_into_int32(packed, scalar_types.uint3b4, 1).shape == (4, 60)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_scheme_takes_every_width(num_bits: int, symmetric: bool) -> None:
    """Dense packing, as in the checkpoints: 32 elements in `num_bits` words, on any platform."""
    of_vllm = scheme(group(num_bits, symmetric=symmetric))
    assert of_vllm.quant_type.size_bits == num_bits
    assert of_vllm.quant_type.has_bias() == symmetric
    assert of_vllm.pack_factor * num_bits == 32


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("num_bits", [2, 3, 5, 6, 7, 8])
def test_own_cpu_kernels_refuse_other_widths_than_4(num_bits: int, symmetric: bool) -> None:
    """When this fails, vLLM has learnt more widths, and the documentation should say so."""
    with pytest.raises(ValueError, match=r"CPUWNA16.*supported types are"):
        choose(group(num_bits, symmetric=symmetric))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have other kernels")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_own_cpu_kernel_takes_4_bits(symmetric: bool) -> None:
    assert choose(group(4, symmetric=symmetric)) == "CPUWNA16LinearKernel"


def chosen_scheme(activations: dict, group_size: int, packing: str) -> str:
    """:return: class name of vLLM's scheme for 4-bit integers in a checkpoint"""
    groups = {"group_0": group(4, group_size=group_size) | {"input_activations": activations}}
    config = {"format": packing, "ignore": ["lm_head"], "config_groups": groups}
    of_vllm = CompressedTensorsConfig.from_config({"quant_method": "compressed-tensors", **config})
    return type(of_vllm.get_scheme(torch.nn.Linear(256, 128))).__name__


def test_w4afp8_is_a_scheme_of_hopper_and_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `w4afp8_autoround` saves it. Other GPUs and CPUs have no scheme for it."""
    with pytest.raises(NotImplementedError, match="No compressed-tensors compatible scheme"):
        chosen_scheme(FP8_TOKEN, 128, "pack-quantized")
    hopper = DeviceCapability(9, 0)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda *_: hopper)
    assert chosen_scheme(FP8_TOKEN, 128, "pack-quantized") == "CompressedTensorsW4A8Fp8"


def test_w4a8_has_a_scheme_for_each_packing() -> None:
    """The former runs on CPUs, the latter, as `w4a8_autoround` saves it, on GPUs."""
    assert chosen_scheme(INT8_TOKEN, 64, "int-quantized") == "CompressedTensorsW4A8Int"
    assert chosen_scheme(INT8_TOKEN, 64, "pack-quantized") == "CompressedTensorsWNA8Int"
