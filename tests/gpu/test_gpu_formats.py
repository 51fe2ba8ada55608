"""
Compiled code on an accelerator rounds as plain code does, format by format.

Inductor may divide approximately, contract a product and a sum, and keep more digits than a dtype
has between two operations (`device.compile_options` forbids all three). Weights in bfloat16 make
ties frequent, so each of that shows in the integers.

What compiled code cannot promise is the last bit of a sum over a group, whose sign decides a step
of alpha or beta. Groups where they differ are counted and must be rare; everywhere else V, the
scales and the integers are the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from runs import chosen_device
from torch import Tensor

from autoround_modifier.activations.functional import fake_quantize_activation
from autoround_modifier.device import Compute, compiled_rounds_as_plain
from autoround_modifier.formats import TunedWeight
from autoround_modifier.host.schemes import weight_spec
from autoround_modifier.search.clipping_range import search_range
from autoround_modifier.search.shared_scale import shared_global_scale

pytestmark = pytest.mark.gpu

ROWS, COLUMNS, GROUP = 512, 1024, 64
STEPS = 20
RARE = 1e-3  # largest share of groups whose alpha or beta may differ


def integers(num_bits: int, symmetric: bool) -> dict[str, Any]:
    fields = {"num_bits": num_bits, "type": "int", "symmetric": symmetric}
    return {**fields, "strategy": "group", "group_size": GROUP}


INTEGERS = {
    f"int{bits} {'symmetric' if symmetric else 'asymmetric'}": integers(bits, symmetric)
    for bits in (2, 4, 8)
    for symmetric in (True, False)
}
FLOATS = {
    "fp8 channel": {"num_bits": 8, "strategy": "channel"},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "nvfp4": {
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    },
}
FORMATS = INTEGERS | {
    name: {"type": "float", "symmetric": True, **fields} for name, fields in FLOATS.items()
}


@pytest.fixture(scope="module")
def device() -> torch.device:
    return chosen_device()


@pytest.fixture(scope="module")
def compute() -> Compute:
    """Compiled; shared, so that no function is compiled twice."""
    return Compute(compiled=True)


def odd_weight(device: torch.device) -> Tensor:
    """:return: (ROWS, COLUMNS), bfloat16: what a layer has, and rows that are hard to round"""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    weight *= torch.logspace(-3, 1, ROWS)[:, None]  # all exponents
    weight[0] = 0
    weight[1] = 0.3  # constant
    weight[2] *= 1e-30
    weight[3] = torch.randint(-8, 8, (COLUMNS,), generator=generator) + 0.5  # ties
    weight[4] = torch.randint(-15, 16, (COLUMNS,), generator=generator) / 7
    weight[5, ::GROUP] = 100  # one outlier in each group
    weight[6] = weight[6].abs()  # one sign
    return weight.bfloat16().to(device)


def tuned(args: QuantizationArgs, device: torch.device, compute: Compute) -> TunedWeight:
    """:return: after `STEPS` steps along gradients that are the same each time"""
    generator = torch.Generator().manual_seed(1)
    weight = odd_weight(device)
    global_scale = shared_global_scale([weight]) if weight_spec(args).global_scale else None
    importance = (torch.rand(COLUMNS, generator=generator) ** 4).to(device)
    fmt = TunedWeight(weight, weight_spec(args), None, global_scale, importance, compute)
    fmt.make_trainable()
    for step in range(STEPS):
        gradient = torch.randn(ROWS, COLUMNS, generator=generator).bfloat16().to(device)
        lr = torch.tensor((1 - step / STEPS) / STEPS, device=device)
        fmt.descend(gradient, lr, lr)
    return fmt


@pytest.mark.parametrize("name", FORMATS)
def test_compiled_steps_give_the_same_integers(name, device, compute, record_property):
    args = QuantizationArgs(**FORMATS[name])
    plain, compiled = (tuned(args, device, each) for each in (Compute(), compute))
    assert compute.compiled == compiled_rounds_as_plain(device)  # no compiler has failed
    dequantized = compiled.dequantize()
    other = torch.zeros(len(plain.weight), dtype=torch.bool, device=device)
    for ours, theirs in zip(plain.clipping, compiled.clipping, strict=True):
        other |= ours != theirs
    ours, theirs = (fmt.quantized() for fmt in (plain, compiled))
    differ = plain.grouping.split(ours.values.float() != theirs.values.float())
    moved = (plain.rounding != compiled.rounding).any(-1)
    scales = (ours.scale != theirs.scale).flatten()
    where = ~other
    counts = {
        "groups": len(other),
        "groups with another alpha or beta": int(other.sum()),
        "groups with another V beside": int((moved & where).sum()),
        "groups with another scale beside": int((scales & where).sum()),
        "groups with other integers beside": int((differ.any(-1) & where).sum()),
        "integers that differ": int(differ.sum()),
        "integers": differ.numel(),
    }
    record_property(name, counts)
    assert int(other.sum()) <= RARE * len(other), counts
    assert not bool(((moved | scales | differ.any(-1)) & where).any()), counts
    assert torch.equal(dequantized, theirs.dequantize())  # what is tuned is what is saved


@pytest.mark.parametrize("name", ["int2 symmetric", "int2 asymmetric", "int4 asymmetric"])
def test_compiled_search_finds_the_same_ranges(name, device, compute, record_property):
    spec = weight_spec(QuantizationArgs(**FORMATS[name]))
    weight = odd_weight(device)
    importance = (torch.rand(COLUMNS, generator=torch.Generator().manual_seed(2)) ** 4).to(device)
    plain, compiled = (
        search_range(weight, spec, importance, None, each) for each in (Compute(), compute)
    )
    assert compute.compiled == compiled_rounds_as_plain(device)
    assert plain is not None
    assert compiled is not None
    other = (plain[0] != compiled[0]) | (plain[1] != compiled[1])
    ours, theirs = (TunedWeight(weight, spec, found).quantized() for found in (plain, compiled))
    counts = {
        "groups": other.numel(),
        "groups with another range": int(other.sum()),
        "integers that differ": int((ours.values != theirs.values).sum()),
        "integers": weight.numel(),
    }
    record_property(name, counts)
    assert int(other.sum()) <= RARE * other.numel(), counts


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "NVFP4"])
def test_compiled_activations_are_the_same(scheme, device, compute, record_property):
    args = preset_name_to_scheme(scheme, ["Linear"]).input_activations
    x = odd_weight(device).view(2, -1, COLUMNS)
    global_scale = shared_global_scale([x]) if scheme == "NVFP4" else None
    arguments = (x, None, None, global_scale, args)
    (plain, _), (compiled, _) = (
        each.run(fake_quantize_activation, lambda _: [arguments], device)[0]
        for each in (Compute(), compute)
    )
    assert compute.compiled == compiled_rounds_as_plain(device)
    differing = int((plain != compiled).sum())
    record_property(scheme, {"numbers that differ": differing, "numbers": x.numel()})
    assert differing == 0
