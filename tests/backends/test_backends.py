"""The kernels of other packages give what Transformers gives (`make test-backends`)."""

from __future__ import annotations

import sys

import pytest
import torch
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from test_loading import SCHEMES, layers, logits, saved, unpacked

from autoround_modifier import BackendError, load
from autoround_modifier.exports.bit_stream import pack_rows
from autoround_modifier.inference.ark_layer import ArkLinear
from autoround_modifier.inference.gptqmodel_layer import finish_gptqmodel, gptqmodel_linear
from autoround_modifier.inference.packed_layer import PackedLinear
from autoround_modifier.inference.packed_weight import PackedSpec, PackedWeight

GPTQ_SCHEMES = [name for name in SCHEMES if name != "W5"]


@pytest.mark.parametrize("name", SCHEMES)
def test_auto_rounds_kernel(name):
    assert "auto_round" not in sys.modules
    model = load(saved(name), dtype=torch.float32)
    assert layers(model, ArkLinear)
    assert not layers(model, PackedLinear)
    assert (logits(model) - logits(unpacked(saved(name)))).abs().max() < 1e-5
    assert "auto_round" not in sys.modules


def test_auto_rounds_kernel_is_closer_than_bfloat16():
    exact = logits(unpacked(saved("W4")))
    own = (logits(unpacked(saved("W4"), torch.bfloat16)).float() - exact).abs().mean()
    assert (logits(load(saved("W4"), "ark")).float() - exact).abs().mean() <= own


@pytest.mark.parametrize("name", GPTQ_SCHEMES)
def test_gptqmodel(name):
    exact = logits(unpacked(saved(name)))
    model = load(saved(name), "gptqmodel", dtype=torch.bfloat16)
    assert layers(model, BaseQuantLinear)
    assert not layers(model, PackedLinear)
    own = (logits(unpacked(saved(name), torch.bfloat16)).float() - exact).abs().mean()
    assert (logits(model).float() - exact).abs().mean() < 2 * own


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "columns"), [(32, 256), (128, 256), (-1, 256), (-1, 768)])
def test_one_layer_in_gptqmodel(bits, symmetric, group_size, columns):
    rows = 96
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    groups = 1 if group_size == -1 else columns // group_size
    scale = (torch.rand(rows, groups) - 0.5).bfloat16() / 50
    zero_point = torch.randint(0, 2**bits, (rows, groups), dtype=torch.int16)
    spec = PackedSpec("layer", rows, columns, bits, symmetric, group_size)
    weight = PackedWeight(spec, pack_rows(codes, bits), scale, None if symmetric else zero_point)
    zero = torch.tensor(2.0 ** (bits - 1)).expand(rows, groups) if symmetric else zero_point
    expanded = (x.float().repeat_interleave(columns // groups, dim=1) for x in (zero, scale))
    zero, scale = expanded
    dense = (codes.float() - zero) * scale
    bias = torch.randn(rows) / 10
    layer = gptqmodel_linear(weight, bias, torch.bfloat16).eval()
    finish_gptqmodel(torch.nn.Sequential(layer))
    input = torch.randn(3, columns).bfloat16()
    with torch.no_grad():
        result = layer(input).float()
    expected = input.float() @ dense.T + bias
    assert (result - expected).abs().max() < 0.02 * expected.abs().max()


def test_bits_that_gptqmodel_does_not_take():
    with pytest.raises(BackendError, match=r"(?s)takes 2, 3, 4 or 8 bits, not 5.*`ark`, `torch`"):
        load(saved("W5"), "gptqmodel", dtype=torch.bfloat16)
