"""K-quants: the grid, its gradients, and the blocks of llama.cpp, as read by PyPI's gguf."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from autoround_modifier import device
from autoround_modifier.device import Compute
from autoround_modifier.exports.gguf_super_blocks import SUPER_BLOCK_BYTES, pack_super_blocks
from autoround_modifier.formats import QuantizedWeight, TunedWeight
from autoround_modifier.formats.super_block import SUPER_BLOCK_SPECS
from autoround_modifier.search import search_range
from autoround_modifier.search.super_block_search import _ranges, _Search

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KINDS = list(SUPER_BLOCK_SPECS)
# bits of a value, weights of a sub-block, bits of its scale; bytes of a super-block
GGML = {
    "q2_k": (2, 16, 4, 84),
    "q3_k": (3, 16, 6, 110),
    "q4_k": (4, 32, 6, 144),
    "q5_k": (5, 32, 6, 176),
    "q6_k": (6, 16, 8, 210),
}


def heavy_tailed(rows: int = 12, columns: int = 512, dtype: torch.dtype = BF16) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    return (0.02 * weight * weight.abs().sqrt()).to(dtype)


def exact(quantized: QuantizedWeight) -> torch.Tensor:
    """The weights that the file has, float32."""
    return replace(quantized.grid, dtype=F32).dequantize(quantized.parts, quantized.grouping)


def read_by_gguf(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    number = gguf.GGMLQuantizationType[kind.upper()]
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), number))


@pytest.mark.parametrize("kind", KINDS)
def test_specifications_are_those_of_ggml(kind):
    bits, size, scale_bits, num_bytes = GGML[kind]
    spec = SUPER_BLOCK_SPECS[kind]
    assert (spec.num_bits, spec.group_size, spec.scale_bits) == (bits, size, scale_bits)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]] == (256, num_bytes)
    assert SUPER_BLOCK_BYTES[kind] == num_bytes
    assert spec.grouping((4, 512)).scale_shape == (4, 512 // size)
    with pytest.raises(ValueError, match="rows of 640 weights"):
        spec.grouping((4, 640))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_blocks_are_read_as_the_tuned_weights(kind, dtype):
    state = TunedWeight(heavy_tailed(dtype=dtype), SUPER_BLOCK_SPECS[kind])
    state.make_trainable()
    for _ in range(3):
        gradient = torch.randn(12, 512).to(dtype)
        state.descend(gradient, torch.tensor(0.3), torch.tensor(0.1))
    quantized = state.quantized()
    blocks = pack_super_blocks(quantized.parts, kind)
    assert (blocks.dtype, blocks.shape) == (torch.uint8, (12, 2 * SUPER_BLOCK_BYTES[kind]))
    assert torch.equal(read_by_gguf(blocks, kind), exact(quantized))
    assert torch.equal(state.dequantize(), quantized.dequantize())
    assert torch.equal(state.dequantize(), exact(quantized).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_all_values_of_all_parts_are_packed(kind):
    """Integers over their whole ranges, at random places."""
    spec = SUPER_BLOCK_SPECS[kind]
    grid, grouping = spec.grid(F32), spec.grouping((8, 1024))
    low, high = grid.code_range
    least, most = grid.scale_range
    integer = torch.int8 if spec.symmetric else torch.uint8
    shape = (32, grid.sub_blocks)
    parts = {
        "values": torch.randint(low, high + 1, (8, 1024)).to(integer),
        "d": torch.randn(32).to(F16),
        "scales": torch.randint(least, most + 1, shape).to(integer),
    }
    if not spec.symmetric:
        parts["dmin"] = torch.randn(32).to(F16)
        parts["mins"] = torch.randint(0, most + 1, shape).to(integer)
    found = read_by_gguf(pack_super_blocks(parts, kind), kind)
    assert torch.equal(found, QuantizedWeight(parts, grid, grouping).dequantize())


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_rounding(kind):
    """Relative squared error, from observed ranges."""
    weight = heavy_tailed(64, 1024, F32)
    found = exact(TunedWeight(weight, SUPER_BLOCK_SPECS[kind]).quantized())
    error = float((found - weight).square().sum() / weight.square().sum())
    limits = {"q2_k": 0.16, "q3_k": 0.04, "q4_k": 0.011, "q5_k": 0.0026, "q6_k": 0.00065}
    assert limits[kind] / 3 < error < limits[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_constants(kind):
    weight = torch.zeros(3, 512)
    weight[1] = 0.5
    weight[2] = -0.25
    quantized = TunedWeight(weight, SUPER_BLOCK_SPECS[kind]).quantized()
    found = exact(quantized)
    assert (found[0] == 0).all()
    assert torch.allclose(found, weight, rtol=0.04)
    assert torch.equal(read_by_gguf(pack_super_blocks(quantized.parts, kind), kind), found)


@pytest.mark.parametrize(
    ("kind", "slices"),
    [
        *((kind, slices) for kind in KINDS for slices in ("whole", "sliced")),
        ("q2_k", "compiled"),  # one that is asymmetric, and one that is not
        ("q3_k", "compiled"),
    ],
)
def test_tuning(kind, slices, monkeypatch):
    """12 rows of two super-blocks; slices of at most 2.5 rows."""
    weight, inputs = heavy_tailed(), torch.randn(64, 512)
    if slices == "sliced":
        monkeypatch.setattr(device, "CPU_SLICE_ELEMENTS", 1280)
    compute = Compute(compiled=slices == "compiled")
    state = TunedWeight(
        weight, SUPER_BLOCK_SPECS[kind], importance=inputs.square().sum(0), compute=compute
    )

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
    assert error() < (0.9 if kind == "q6_k" else 0.7) * initial  # bfloat16 limits 6 bits
    assert torch.equal(state.quantized().dequantize(), state.dequantize())
    assert compute.compiled == (slices == "compiled")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    """
    Straight through all roundings: V's is the step of its sub-block; alpha's and beta's are those
    of scale and minimum without their rounding, for the codes that they gave.
    """
    spec = SUPER_BLOCK_SPECS[kind]
    grid = spec.grid(F32)
    groups = torch.randn(grid.sub_blocks, spec.group_size)
    w_min, w_max = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    rounding = torch.zeros_like(groups, requires_grad=True)
    alpha, beta = (torch.ones_like(w_min, requires_grad=True) for _ in range(2))
    found, scale = grid.fake_quantize(groups, w_min, w_max, None, rounding, alpha, beta)
    found.sum().backward()

    codes = grid.sub_scales(w_min, w_max)
    q = grid.codes(groups, codes.scale(), codes.low())
    x = (groups + codes.low()) / codes.scale()
    inside = (x.round() >= grid.code_range[0]) & (x.round() <= grid.code_range[1])
    assert torch.allclose(rounding.grad, scale.detach().expand_as(groups) * inside)
    # d(scale * q)/d scale = q - x inside the range, where q moves with the scale; else q
    by_scale = torch.where(inside, q - x, q).sum(-1)
    if spec.symmetric:
        unrounded = torch.where(w_max > -w_min, w_max, w_min) / -(2 ** (spec.num_bits - 1))
        total = (by_scale * unrounded).sum()
        assert torch.allclose(alpha.grad.sum() + beta.grad.sum(), total, rtol=0.1, atol=0.05)
    else:
        by_low = torch.where(inside, 0.0, -1.0).sum(-1)
        total = (by_scale * (w_max - w_min) / grid.code_range[1] - by_low * w_min).sum()
        assert torch.allclose(alpha.grad.sum() + beta.grad.sum(), total, rtol=0.1, atol=0.3)
    assert (rounding.grad != 0).float().mean() > 0.8


def test_the_largest_scale_of_a_super_block_is_full():
    for kind, spec in SUPER_BLOCK_SPECS.items():
        parts = TunedWeight(heavy_tailed(), spec).quantized().parts
        full = spec.grid(BF16).full_scale
        extreme = parts["scales"].amin(-1) if spec.symmetric else parts["scales"].amax(-1)
        assert extreme.tolist() == [full] * 24, kind
        assert not (parts["scales"] == 0).any()
        if not spec.symmetric:
            assert parts["mins"].amax(-1).tolist() == [full] * 24


def test_slices_hold_whole_super_blocks(monkeypatch):
    weight, spec = torch.randn(12, 512), SUPER_BLOCK_SPECS["q4_k"]
    whole = TunedWeight(weight, spec).quantized().parts
    monkeypatch.setattr(device, "CPU_SLICE_ELEMENTS", 1280)
    for name, part in TunedWeight(weight, spec).quantized().parts.items():
        assert torch.equal(part, whole[name])


def test_parts():
    parts = TunedWeight(heavy_tailed(), SUPER_BLOCK_SPECS["q4_k"]).quantized().parts
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        "values": (torch.uint8, (12, 512)),
        "d": (F16, (24,)),
        "dmin": (F16, (24,)),
        "scales": (torch.uint8, (24, 8)),
        "mins": (torch.uint8, (24, 8)),
    }
    parts = TunedWeight(heavy_tailed(), SUPER_BLOCK_SPECS["q6_k"]).quantized().parts
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        "values": (torch.int8, (12, 512)),
        "d": (F16, (24,)),
        "scales": (torch.int8, (24, 16)),
    }
    assert np.dtype(np.uint8) == pack_super_blocks(parts, "q6_k").numpy().dtype


# ------------------------------------------------------------------------------- the search


def weighted_error(state: TunedWeight, weight: torch.Tensor, importance: torch.Tensor) -> float:
    difference = exact(state.quantized()) - weight
    return float((importance * difference.square()).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_search(kind, weighted, monkeypatch):
    """Less error than from observed ranges, by as much as was measured; in slices alike."""
    weight, spec = heavy_tailed(16, 512, F32), SUPER_BLOCK_SPECS[kind]
    importance = torch.exp(torch.randn(512)) if weighted else torch.ones(512)
    found = search_range(weight, spec, importance)
    plain, searched = (
        weighted_error(TunedWeight(weight, spec, ends), weight, importance)
        for ends in (None, found)
    )
    gains = {"q2_k": 0.7, "q3_k": 0.93, "q4_k": 0.88, "q5_k": 0.9, "q6_k": 0.93}
    assert searched < (gains[kind] - 0.1 * weighted) * plain
    monkeypatch.setattr(device, "CPU_SLICE_ELEMENTS", 1280)
    for whole, sliced in zip(found, search_range(weight, spec, importance), strict=True):
        assert torch.equal(whole, sliced)


@pytest.mark.parametrize("kind", KINDS)
def test_search_returns_the_ranges_of_the_scales_it_found(kind):
    """Its own error, of scales that it never turns into ranges, is that of the grid."""
    weight, spec = heavy_tailed(16, 512, F32), SUPER_BLOCK_SPECS[kind]
    weight[1] = weight[1].abs() + 0.01
    weight[2] = -weight[2].abs() - 0.01
    weight[3] = 0
    grid = spec.grid(F32)
    groups = spec.grouping((16, 512)).split(weight)
    search = _Search(grid, groups, torch.ones_like(groups))
    scale, low = search._each_alone()
    best = search._units(search._cut(scale), search._cut(low))
    best = search._refitted(search._neighbours(best))
    again = grid.sub_scales(*_ranges(grid, best))
    for name, found in again._asdict().items():
        assert torch.equal(found, getattr(best, name)), name


def test_search_sees_the_quantization_of_the_scales():
    """The best range of each sub-block alone is not the best one under shared units."""
    weight, spec = heavy_tailed(16, 512, F32), SUPER_BLOCK_SPECS["q2_k"]
    importance = torch.ones(512)
    grid = spec.grid(F32)
    groups = spec.grouping((16, 512)).split(weight)
    scale, low = (
        x.squeeze(-1) for x in _Search(grid, groups, torch.ones_like(groups))._each_alone()
    )
    alone = TunedWeight(weight, spec, (-low, 3 * scale - low))
    whole = TunedWeight(weight, spec, search_range(weight, spec, importance))
    errors = [weighted_error(state, weight, importance) for state in (alone, whole)]
    assert errors[1] < 0.97 * errors[0]
