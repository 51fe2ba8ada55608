"""Alpha and beta may become very small, but never make a scale that nothing can be divided by."""

from __future__ import annotations

import pytest
import torch
from helpers import tuned_weight

from autoround_modifier.formats.tuned_weight import SMALLEST_CLIPPING
from autoround_modifier.host.schemes import QuantizationArgs, preset_name_to_scheme


def preset(name: str) -> QuantizationArgs:
    return preset_name_to_scheme(name, ["Linear"]).weights


FORMATS = {
    **{
        f"W{bits} {'symmetric' if symmetric else 'asymmetric'}": QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy="group", group_size=32
        )
        for bits in (2, 4, 8)
        for symmetric in (True, False)
    },
    "FP8": preset("FP8_DYNAMIC"),
    "MXFP4": preset("MXFP4A16"),
    "MXFP8": preset("MXFP8A16"),
    "NVFP4": preset("NVFP4A16"),
}


CASES = [
    (name, dtype)
    for name in FORMATS
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    if not name.startswith("MX") or dtype == torch.bfloat16  # others are refused
]


@pytest.mark.parametrize("searched", [True, False])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_large_step_of_alpha_and_beta(name, dtype, searched):
    args = FORMATS[name]
    weight = (1000 * torch.randn(4, 64)).to(dtype)
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3] = 0
    global_scale = None
    if args.strategy == "tensor_group":
        global_scale = 448 * 6 / weight.abs().max().float().view(1)
    state = tuned_weight(weight, args, None, global_scale)
    found = (2 * state.w_min, 2 * state.w_max) if searched else None
    state = tuned_weight(weight, args, found, global_scale)
    state.make_trainable(tune_clipping=True)
    smallest = 1.0
    for _ in range(20):
        gradient = torch.randn(4, 64).to(dtype)
        state.descend(gradient, torch.tensor(0.1), torch.tensor(30.0))
        smallest = min(smallest, *(float(factor.min()) for factor in state.clipping))
        for tensor in (state.rounding, *state.clipping, state.dequantize()):
            assert torch.isfinite(tensor).all()
    assert smallest == SMALLEST_CLIPPING > 0
    quantized = state.quantized()
    assert torch.isfinite(quantized.scale.float()).all()
    assert (quantized.scale.float() != 0).all()
    assert torch.isfinite(quantized.dequantize()).all()
