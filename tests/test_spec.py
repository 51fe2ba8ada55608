"""Formats by specification: those of compressed-tensors, other scale types, and one of its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from autoround_modifier import device
from autoround_modifier.device import Compute
from autoround_modifier.formats import (
    FloatGrid,
    Grid,
    Grouping,
    IntegerGrid,
    MicroscalingGrid,
    NVFP4Grid,
    QuantizedWeight,
    TunedWeight,
    WeightSpec,
)
from autoround_modifier.formats.floating import E2M1, E4M3
from autoround_modifier.formats.grid import cast_ste, round_ste, scale_floor
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


# --------------------------------------------------------------------- a format of its own


@dataclass(frozen=True)
class SuperBlockGrid(Grid):
    """
    Like GGUF's Q4_K: ``d * scale * q - dmin * min`` with ``q`` from 0 to 15. Scales and minima of
    eight groups side by side have 6 bits, and share ``d`` and ``dmin``.
    """

    tune_clipping = True
    groups = 8

    def _fields(self, w_min, w_max, alpha, beta) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:return: d and dmin, (..., super-blocks, 1); scales and minima, (..., super-blocks, 8)"""
        low = -w_min if alpha is None else -w_min * alpha
        high = w_max if beta is None else w_max * beta
        found = []
        for wanted, least in (((low + high) / 15, 1), (low, 0)):
            wanted = wanted.unflatten(-1, (-1, self.groups))
            unit = wanted.amax(-1, keepdim=True) / 63
            unit = cast_ste(unit.clamp(min=scale_floor(self.scale_dtype)), self.scale_dtype)
            found += [unit, round_ste(wanted / unit).clamp(least, 63)]
        d, scales, dmin, mins = found
        return d, dmin, scales, mins

    def _values(self, weight, scale, low, rounding) -> Tensor:
        x = (weight.float() + low) / scale
        return round_ste(x if rounding is None else x + rounding).clamp(0, 15)

    def fake_quantize(
        self, weight, w_min, w_max, global_scale=None, rounding=None, alpha=None, beta=None
    ):
        d, dmin, scales, mins = self._fields(w_min, w_max, alpha, beta)
        scale, low = ((x * y).flatten(-2).unsqueeze(-1) for x, y in ((d, scales), (dmin, mins)))
        return self._values(weight, scale, low, rounding) * scale - low, scale

    def quantize_parts(
        self, weight, w_min, w_max, global_scale=None, rounding=None, alpha=None, beta=None
    ):
        d, dmin, scales, mins = self._fields(w_min, w_max, alpha, beta)
        scale, low = ((x * y).flatten(-2).unsqueeze(-1) for x, y in ((d, scales), (dmin, mins)))
        return {
            "values": self._values(weight, scale, low, rounding).to(torch.uint8),
            "d": d.squeeze(-1).to(self.scale_dtype),
            "dmin": dmin.squeeze(-1).to(self.scale_dtype),
            "scales": scales.to(torch.uint8),
            "mins": mins.to(torch.uint8),
        }

    def dequantize(self, parts, grouping):
        scale, low = (
            (parts[unit].float().unsqueeze(-1) * parts[factors]).view(-1, 1)
            for unit, factors in (("d", "scales"), ("dmin", "mins"))
        )
        values = grouping.split(parts["values"]).float()
        return grouping.join((values * scale - low).to(self.dtype))


@dataclass(frozen=True)
class SuperBlockSpec:
    num_bits: int = 4
    is_integer: bool = True

    def grid(self, dtype: torch.dtype) -> Grid:
        return SuperBlockGrid(dtype, F16)

    def grouping(self, shape: tuple[int, ...]) -> Grouping:
        rows, columns = shape
        return Grouping((rows, columns), (1, 32), (rows, columns // 32))


def parts_of(state: TunedWeight) -> QuantizedWeight:
    quantized = state.quantized()
    assert torch.equal(quantized.dequantize(), state.dequantize())
    return quantized


@pytest.mark.parametrize("slices", ["whole", "sliced", "compiled"])
def test_super_blocks(slices, monkeypatch):
    """12 rows of two super-blocks of eight groups of 32; slices of at most 2.5 rows."""
    weight, inputs = torch.randn(12, 512).to(BF16), torch.randn(64, 512)
    importance = inputs.square().sum(0)
    if slices == "sliced":
        monkeypatch.setattr(device, "CPU_SLICE_ELEMENTS", 1280)
    compute = Compute(compiled=slices == "compiled")
    spec = SuperBlockSpec()
    assert search_range(weight, spec, importance) is None
    state = TunedWeight(weight, spec, None, importance=importance, compute=compute)

    parts = parts_of(state).parts
    shapes = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
    assert shapes == {
        "values": (torch.uint8, (12, 512)),
        "d": (F16, (24,)),
        "dmin": (F16, (24,)),
        "scales": (torch.uint8, (24, 8)),
        "mins": (torch.uint8, (24, 8)),
    }
    assert parts["values"].max() == 15
    assert parts["scales"].amax(-1).tolist() == parts["mins"].amax(-1).tolist() == [63] * 24

    def error() -> float:
        return float((inputs @ (state.dequantize() - weight).float().T).square().mean())

    state.make_trainable()
    assert len(state.clipping) == 2
    initial = error()
    for step in range(40):
        difference = inputs @ (state.dequantize() - weight).float().T
        gradient = (difference.T @ inputs).to(BF16)
        decay = 1 - step / 40
        state.descend(gradient, torch.tensor(decay / 40), torch.tensor(decay / 400))
    assert error() < 0.5 * initial
    assert (state.clipping[0] != 1).any()
    parts_of(state)
    assert compute.compiled == (slices == "compiled")


def test_slices_hold_whole_super_blocks(monkeypatch):
    weight = torch.randn(12, 512)
    spec = SuperBlockSpec()
    whole = parts_of(TunedWeight(weight, spec)).parts
    monkeypatch.setattr(device, "CPU_SLICE_ELEMENTS", 1280)
    for name, part in parts_of(TunedWeight(weight, spec)).parts.items():
        assert torch.equal(part, whole[name])
