"""GGUF files as Transformers' own loader dequantizes them."""

from __future__ import annotations

import pytest
import torch
from rows import ROWS
from torch_models import dense_logits, logits, token_ids
from transformers import AutoModelForCausalLM

ENGINE = "gguf"
PACKAGES = ("transformers", "gguf", "torch")
SCHEMES = {row.name: row.schemes for row in ROWS}

UNKNOWN_TYPE = "is not a valid GGMLQuantizationType"
# It takes the numbers by which products with NVFP4 are multiplied for weights.
FACTORS = "cannot reshape array of size 1"


def refusal(row: str, format: str) -> str:
    """:return: what Transformers says of a file that it does not load; empty if it loads it"""
    two_bits = any(scheme[:3] == (2, True, 64) for scheme in SCHEMES[row])
    if format == "gguf:q2_0" or (format == "gguf:auto" and two_bits):
        return UNKNOWN_TYPE  # gguf 0.19 ends before Q2_0, which `auto` chooses as well
    return FACTORS if format == "gguf:nvfp4" else ""


def load(case):
    return AutoModelForCausalLM.from_pretrained(
        case.path.parent, gguf_file=case.path.name, dtype=torch.float32
    )


@pytest.mark.cases(("gguf:",), only=lambda *case: not refusal(*case))
def test_logits(case, record):
    """The file holds the weights of the dequantized model, so that logits are the same."""
    gap = float(
        (logits(load(case), token_ids(case.folder)) - dense_logits(case.folder)).abs().max()
    )
    record(case, "run", gap=gap)
    assert gap == 0


@pytest.mark.cases(("gguf:",), only=refusal)
def test_refused(case, record):
    reason = refusal(case.row, case.format)
    record(case, "refused", reason=reason)
    with pytest.raises(ValueError, match=reason):
        load(case)
