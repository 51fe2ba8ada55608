"""Formats by specification: those of compressed-tensors, and other scale types."""

from __future__ import annotations

import pytest
import torch

from autoround_modifier.formats import (
    FloatGrid,
    Grouping,
    IntegerGrid,
    MicroscalingGrid,
    NVFP4Grid,
    TunedWeight,
    WeightSpec,
)
from autoround_modifier.formats.floating import E2M1, E4M3
from autoround_modifier.host.schemes import QuantizationArgs, preset_name_to_scheme, weight_spec
from autoround_modifier.search import search_range

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPE = (40, 96)


def preset(name: str) -> QuantizationArgs:
    return preset_name_to_scheme(name, ["Linear"]).weights


def integers(num_bits: int, symmetric: bool, group_size: int | None) -> QuantizationArgs:
    fields = {"strategy": "channel"} if group_size is None else {"group_size": group_size}
    return QuantizationArgs(num_bits=num_bits, symmetric=symmetric, **fields)


# arguments; the same as a specification; tile, shape of the scale, and grid of a (40, 96) weight
FORMATS = {
    **{
        f"W{bits} {'symmetric' if symmetric else 'asymmetric'}": (
            integers(bits, symmetric, 32),
            WeightSpec("int", bits, symmetric, "group", 32),
            (1, 32),
            (40, 3),
            IntegerGrid(BF16, BF16, bits, symmetric),
        )
        for bits in range(2, 9)
        for symmetric in (True, False)
    },
    "W8 channel": (
        integers(8, True, None),
        WeightSpec("int", 8, True, "channel"),
        (1, 96),
        (40, 1),
        IntegerGrid(BF16, BF16, 8, True),
    ),
    "FP8 tensor": (
        preset("FP8"),
        WeightSpec("float", 8, strategy="tensor"),
        (40, 96),
        (1,),
        FloatGrid(BF16, BF16, E4M3),
    ),
    "FP8 channel": (
        preset("FP8_DYNAMIC"),
        WeightSpec("float", 8, strategy="channel"),
        (1, 96),
        (40, 1),
        FloatGrid(BF16, BF16, E4M3),
    ),
    "FP8 group": (
        QuantizationArgs(num_bits=8, type="float", group_size=48),
        WeightSpec("float", 8, group_size=48),
        (1, 48),
        (40, 2),
        FloatGrid(BF16, BF16, E4M3),
    ),
    "FP8 block": (
        QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[32, 64]),
        WeightSpec("float", 8, strategy="block", block=(32, 64)),
        (32, 64),
        (2, 2),
        FloatGrid(BF16, BF16, E4M3),
    ),
    "MXFP4": (
        preset("MXFP4A16"),
        WeightSpec("float", 4, group_size=32, power_of_two_scale=True),
        (1, 32),
        (40, 3),
        MicroscalingGrid(BF16, BF16, E2M1),
    ),
    "MXFP8": (
        preset("MXFP8A16"),
        WeightSpec("float", 8, group_size=32, power_of_two_scale=True),
        (1, 32),
        (40, 3),
        MicroscalingGrid(BF16, BF16, E4M3),
    ),
    "NVFP4": (
        preset("NVFP4A16"),
        WeightSpec("float", 4, group_size=16, global_scale=True),
        (1, 16),
        (40, 6),
        NVFP4Grid(BF16, BF16, E2M1),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_compressed_tensors(name):
    args, spec, tile, scale_shape, grid = FORMATS[name]
    assert weight_spec(args) == spec
    assert spec.is_integer == isinstance(grid, IntegerGrid)
    assert spec.grouping(SHAPE) == Grouping(SHAPE, tile, scale_shape)
    assert spec.grid(BF16) == grid
    assert type(spec.grid(BF16)) is type(grid)
    assert hash(spec.grid(BF16)) == hash(grid)  # compiled functions depend on it


@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_a_quantized_weight(name):
    _, spec, _, scale_shape, grid = FORMATS[name]
    global_scale = torch.tensor([600.0]) if spec.global_scale else None
    weight = torch.randn(SHAPE).to(BF16)
    quantized = TunedWeight(weight, spec, None, global_scale).quantized()
    shapes = {part: tuple(tensor.shape) for part, tensor in quantized.parts.items()}
    expected = {"values": SHAPE, "scale": scale_shape, "zero_point": scale_shape}
    assert shapes == expected | ({"global_scale": (1,)} if spec.global_scale else {})
    assert quantized.values.dtype == grid.code_dtype
    assert quantized.scale.dtype == BF16
    assert quantized.zero_point.dtype == torch.int8
    dequantized = quantized.dequantize()
    assert (dequantized.shape, dequantized.dtype) == (SHAPE, BF16)
    error = (dequantized - weight).float().square().mean().sqrt()
    assert error < {2: 0.6, 3: 0.25}.get(spec.num_bits, 0.15)


# --------------------------------------------------------------------- another type of scale

OTHER_SCALES = {
    "W4 asymmetric": WeightSpec("int", 4, False, "group", 32, scale_dtype=F16),
    "W2 symmetric": WeightSpec("int", 2, True, "group", 32, scale_dtype=F16),
    "FP8": WeightSpec("float", 8, strategy="channel", scale_dtype=F16),
}


@pytest.mark.parametrize("name", OTHER_SCALES)
def test_float16_scales_of_a_bfloat16_weight(name):
    spec = OTHER_SCALES[name]
    weight = torch.randn(SHAPE).to(BF16)
    importance = torch.rand(96)
    state = TunedWeight(weight, spec, search_range(weight, spec, importance))
    state.make_trainable(tune_clipping=True)
    for _ in range(5):
        gradient = torch.randn(SHAPE).to(BF16)
        state.descend(gradient, torch.tensor(0.1), torch.tensor(0.01))
    assert (state.clipping[0] != 1).any()
    quantized = state.quantized()
    assert quantized.scale.dtype == F16
    assert (quantized.scale != quantized.scale.to(BF16)).any()  # bfloat16 has fewer bits
    assert quantized.dequantize().dtype == BF16
    # What is tuned is what is saved, with the scale as it is rounded.
    assert torch.equal(state.dequantize(), quantized.dequantize())
    steps = state.grouping.split(quantized.values).float() - quantized.zero_point.view(-1, 1)
    by_hand = (steps * quantized.scale.float().view(-1, 1)).to(BF16)
    assert torch.equal(state.grouping.join(by_hand), quantized.dequantize())


def test_tiny_groups_have_a_scale_that_float16_holds():
    spec = WeightSpec("int", 4, True, "group", 32, scale_dtype=F16)
    weight = torch.zeros(SHAPE, dtype=BF16)
    weight[1] = 1e-9
    quantized = TunedWeight(weight, spec).quantized()
    assert (quantized.scale.float().abs() >= 2.0**-20).all()
    assert (quantized.dequantize() == 0).all()
