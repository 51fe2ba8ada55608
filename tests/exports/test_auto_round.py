"""
The format of auto-round as Transformers reads it with auto-round, on a CPU.

With auto-round-lib its kernel for CPUs (ARK) computes 2, 4 and 8 bits in float32; 3 bits run in
auto-round's PyTorch kernel, which computes in 16 bits.
"""

from __future__ import annotations

import pytest
import torch
from torch_models import (
    HALF_A_STEP,
    dense_logits,
    kernels,
    logits,
    token_ids,
    weight_gap,
)
from transformers import AutoModelForCausalLM

ENGINE = "auto_round"
PACKAGES = ("transformers", "auto-round", "auto-round-lib", "torch")

# Norm of the differences of logits, as a part of that of the logits: the order of float32 sums.
# Measured: 3.4e-6, where the same model in float64 is 2.4e-6 from float32. Of 3 bits, the largest
# difference of a logit, whose standard deviation is 3.2; measured: 0.25.
FLOAT32, THREE_BITS = 1e-5, 0.6
# As a part of a weight: one product in float32
EXACT = 2.0**-22


@pytest.mark.cases(("auto_round",))
def test_logits(case, record):
    model = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32, device_map="cpu")
    expected = dense_logits(case.folder)
    difference = logits(model, token_ids(case.folder)) - expected
    gap, used = float(difference.abs().max()), kernels(model)
    relative_gap = float(difference.norm() / expected.norm())
    weights = weight_gap(model, case.folder, torch.float32)
    three = case.row.startswith("w3")
    record(case, "run", gap=gap, relative_gap=relative_gap, weight_gap=weights, kernels=used)
    assert used
    assert weights <= (HALF_A_STEP[torch.bfloat16] if three else EXACT)
    if three:
        assert gap <= THREE_BITS
    else:
        assert relative_gap <= FLOAT32
