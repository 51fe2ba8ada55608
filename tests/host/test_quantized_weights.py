"""host/quantized_weights.py: compressed-tensors quantizes a weight again when it is saved."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import (
    QuantizationScheme,
    QuantizationStatus,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import quantize
from torch import nn

from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.host.quantized_weights import (
    matches_saved_layer,
    quantized_layers,
    read_layer,
    read_saved_layer,
)
from autoround_modifier.host.schemes import QuantizationArgs

W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 2}


@pytest.mark.parametrize("dtype", [torch.int8, None])
def test_integers(dtype):
    weight = torch.tensor([[0.26, -8.0, 3.0, 9.0]])
    scale, zero_point = torch.tensor([[0.5, 1.0]]), torch.tensor([[0, -2]], dtype=torch.int8)
    args = QuantizationArgs(**W4, symmetric=False)
    codes = quantize(weight, scale, zero_point, args, dtype=dtype)
    assert codes.dtype == (torch.int8 if dtype else torch.float32)
    assert codes.tolist() == [[1, -8, 1, 7]]


def test_the_division_is_in_the_dtype_of_the_weight():
    """99.5 / 1.0078125 is 98.73; bfloat16, whose step there is 0.5, has 98.5, a tie."""
    args = QuantizationArgs(num_bits=8, strategy="channel")
    weight, scale = torch.tensor([[99.5]]), torch.tensor([[1.0078125]])
    zero = torch.zeros(1, 1, dtype=torch.int8)
    assert quantize(weight, scale, zero, args).item() == 99
    codes = quantize(weight.bfloat16(), scale.bfloat16(), zero, args)
    assert (codes.dtype, codes.item()) == (torch.bfloat16, 98)


def test_tensors_rows_groups_and_blocks():
    weight = torch.arange(1.0, 13).view(3, 4)
    zero = torch.zeros((), dtype=torch.int8)

    def codes(scale: list, **fields) -> list:
        args = QuantizationArgs(num_bits=8, **fields)
        return quantize(weight, torch.tensor(scale), zero, args).tolist()

    assert codes([2.0], strategy="tensor")[0] == [0, 1, 2, 2]
    assert codes([[1.0], [2.0], [3.0]], strategy="channel")[2] == [3, 3, 4, 4]
    grouped = codes([[1.0, 2.0], [1, 1], [1, 1]], strategy="group", group_size=2)
    assert grouped[0] == [1, 2, 2, 2]
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[2, 4])
    blocks = quantize(weight, torch.tensor([[1.0], [4.0]]), zero.expand(2, 1), args)
    assert blocks.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [2.25, 2.5, 2.75, 3]]


def test_floating_point_numbers():
    args = preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    weight = torch.tensor([[0.24, 0.26, -1.7, 5.1] * 4])
    scale, zero = torch.tensor([[2.0]]), torch.zeros(1, 1)
    codes = quantize(weight, scale, zero, args, global_scale=torch.tensor([2.0]))
    assert codes[0, :4].tolist() == [0, 0.5, -1.5, 6.0]


def test_a_layer_is_read_as_it_will_be_saved():
    layer = nn.Linear(4, 1, bias=False)
    other = nn.Linear(4, 1)
    args = QuantizationArgs(**W4, symmetric=False)
    initialize_module_for_quantization(layer, QuantizationScheme(targets=["Linear"], weights=args))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.26, -8.0, 3.0, 9.0]]))
        layer.weight_scale.copy_(torch.tensor([[0.5, 1.0]]))
        layer.weight_zero_point.copy_(torch.tensor([[0, -2]]))
    model = nn.Sequential(layer, other)
    assert [(name, x) for name, x, _ in quantized_layers(model)] == [("0", layer)]
    found = read_layer(layer, args)
    assert found.values.dtype == torch.int8
    assert found.values.tolist() == [[1, -8, 1, 7]]
    assert found.scale.tolist() == [[0.5, 1.0]]
    assert found.zero_point.tolist() == [[0, -2]]
    assert found.global_scale is None
    layer.weight_scale.data.zero_()
    assert found.scale.tolist() == [[0.5, 1.0]]  # tensors of its own


@pytest.mark.parametrize(
    "preset",
    [
        "W2A16",
        "W4A16_ASYM",
        "W8A8",
        "W4A8",
        "FP8",
        "FP8_DYNAMIC",
        "MXFP4A16",
        "MXFP8A16",
        "NVFP4A16",
    ],
)
def test_a_layer_is_compressed_in_memory_when_it_is_saved(preset):
    layer = nn.Linear(128, 4, bias=False, dtype=torch.bfloat16)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    initialize_module_for_quantization(layer, scheme)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(-4, 4).repeat(64).view(4, 128) / 2)
        layer.weight_scale.fill_(0.5)
        layer.weight_zero_point.zero_()
        if preset == "NVFP4A16":
            layer.weight_global_scale.fill_(1.0)
    before = read_layer(layer, scheme.weights)
    low, high = (-2, 1) if preset == "W2A16" else (-4, 3)
    assert before.values[0, :8].tolist() == [min(max(x, low), high) for x in range(-4, 4)]

    def assert_same(after: QuantizedWeight) -> None:
        assert after.parts.keys() == before.parts.keys()
        for name, part in before.parts.items():
            assert torch.equal(after.parts[name].float(), part.float()), name

    compress_module(layer)
    assert layer.quantization_status == QuantizationStatus.COMPRESSED
    tensors = dict(layer.state_dict())
    assert matches_saved_layer(tensors, scheme.weights)
    assert_same(read_layer(layer, scheme.weights))
    assert_same(read_saved_layer(tensors, scheme.weights, torch.bfloat16))
    decompress_module(layer)
    assert layer.quantization_status == QuantizationStatus.DECOMPRESSED
    assert_same(read_layer(layer, scheme.weights))


def test_tensors_that_other_arguments_describe():
    layer = nn.Linear(256, 4, bias=False, dtype=torch.bfloat16)
    initialize_module_for_quantization(layer, preset_name_to_scheme("W4A16", ["Linear"]))
    nn.init.ones_(layer.weight_scale)
    compress_module(layer)
    tensors = dict(layer.state_dict())
    described = {
        name: matches_saved_layer(tensors, preset_name_to_scheme(name, ["Linear"]).weights)
        for name in ("W4A16", "W4A16_ASYM", "W2A16", "W8A16", "W8A8", "FP8", "MXFP4A16", "NVFP4A16")
    }
    assert [name for name, fits in described.items() if fits] == ["W4A16"]
    assert not matches_saved_layer({}, preset_name_to_scheme("W4A16", ["Linear"]).weights)
