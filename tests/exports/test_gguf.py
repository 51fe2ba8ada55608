"""GGUF files as Transformers' own loader dequantizes them."""

from __future__ import annotations

import pytest
import torch
from torch_models import dense_logits, logits, token_ids
from transformers import AutoModelForCausalLM

ENGINE = "gguf"
PACKAGES = ("transformers", "gguf", "torch")

# Types of llama.cpp that gguf 0.19 does not know, or Transformers does not dequantize
UNKNOWN = {
    "gguf:q2_0": "is not a valid GGMLQuantizationType",
}


def load(case):
    return AutoModelForCausalLM.from_pretrained(
        case.path.parent, gguf_file=case.path.name, dtype=torch.float32
    )


@pytest.mark.cases(("gguf:",), only=lambda row, format: format not in UNKNOWN)
def test_logits(case, record):
    """The file holds the weights of the dequantized model, so that logits are the same."""
    gap = float(
        (logits(load(case), token_ids(case.folder)) - dense_logits(case.folder)).abs().max()
    )
    record(case, "run", gap=gap)
    assert gap == 0


@pytest.mark.cases(("gguf:",), only=lambda row, format: format in UNKNOWN)
def test_refused(case, record):
    record(case, "refused", reason=UNKNOWN[case.format])
    with pytest.raises(ValueError, match=UNKNOWN[case.format]):
        load(case)
