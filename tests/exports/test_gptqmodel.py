"""
GPTQ and AWQ on a CPU: as Transformers with GPTQModel and optimum computes them, and as GPTQModel
alone does what Transformers leaves out.
"""

from __future__ import annotations

import pytest
import torch
from gptqmodel import BACKEND, GPTQModel
from rows import ROWS
from torch_models import (
    HALF_A_STEP,
    dense_logits,
    kernels,
    logits,
    token_ids,
    weight_gap,
)
from transformers import AutoModelForCausalLM

ENGINE = "gptqmodel"
PACKAGES = ("transformers", "gptqmodel", "optimum", "torch")
FORMATS = ("gptq", "awq")
SCHEMES = {row.name: row.schemes for row in ROWS}

# Largest difference of logits, whose standard deviation is 3.2, in float32. GPTQModel's kernels
# multiply codes by scales in float16, in which a product has 11 bits, and a scale has 8: products
# with 4 bits and less are exact. Measured: 0; 0.011 with zero points (5 bits); 0.076 with 8 bits.
EXACT, ZERO_POINTS, EIGHT_BITS = 1e-4, 0.04, 0.25


def allowed(row: str) -> float:
    return max(
        EIGHT_BITS if bits == 8 else ZERO_POINTS if bits == 4 and not symmetric else EXACT
        for bits, symmetric, *_ in SCHEMES[row]
    )


def is_channel_of_4_bits(row: str, format: str) -> bool:
    """GPTQModel chooses a kernel that fails with more than 256 input features in a group."""
    return any(bits == 4 and size is None for bits, _, size, _ in SCHEMES[row])


def is_dynamic(row: str, format: str) -> bool:
    """Transformers ignores ``dynamic``, by which some layers have other bits, or none."""
    return format == "gptq" and (len(SCHEMES[row]) > 1 or row == "w4_without_block_0")


def is_ordinary(row: str, format: str) -> bool:
    return not is_channel_of_4_bits(row, format) and not is_dynamic(row, format)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu")


@pytest.mark.cases(FORMATS, only=is_ordinary)
def test_transformers(case, record):
    model = load(case.path)
    difference = logits(model, token_ids(case.folder)) - dense_logits(case.folder)
    gap, used = float(difference.abs().max()), kernels(model)
    weights = weight_gap(model, case.folder, torch.float32)
    record(case, "run", gap=gap, weight_gap=weights, kernels=used)
    assert used
    assert weights <= HALF_A_STEP[torch.float16]
    assert gap <= allowed(case.row)


@pytest.mark.cases(FORMATS, only=lambda *case: not is_ordinary(*case))
def test_gptqmodel(case, record):
    """In float16, in which it computes; weights are those of the checkpoint, rounded to it."""
    backend = BACKEND.GPTQ_TORCH if case.format == "gptq" else BACKEND.AWQ_TORCH
    model = GPTQModel.load(str(case.path), backend=backend, device="cpu", dtype=torch.float16).model
    weights, used = weight_gap(model, case.folder, torch.float16), kernels(model)
    record(case, "GPTQModel", weight_gap=weights, kernels=used)
    assert used
    assert weights <= HALF_A_STEP[torch.float16]


@pytest.mark.cases(FORMATS, only=is_channel_of_4_bits)
def test_its_kernel_for_channels_fails(case, record):
    record(case, "fails", reason="TorchFusedLinear takes no more than 256 input features per scale")
    model = load(case.path)
    with pytest.raises(RuntimeError, match="expect qGroupSize to be 32, 64, 128 or 256"):
        logits(model, token_ids(case.folder))
