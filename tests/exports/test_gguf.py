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

REFUSAL = "is not a valid GGMLQuantizationType"


def is_unknown(row: str, format: str) -> bool:
    """gguf 0.19 ends before Q2_0, which `auto` chooses as well."""
    two_bits = any(scheme[:3] == (2, True, 64) for scheme in SCHEMES[row])
    return format == "gguf:q2_0" or (format == "gguf:auto" and two_bits)


def load(case):
    return AutoModelForCausalLM.from_pretrained(
        case.path.parent, gguf_file=case.path.name, dtype=torch.float32
    )


@pytest.mark.cases(("gguf:",), only=lambda *case: not is_unknown(*case))
def test_logits(case, record):
    """The file holds the weights of the dequantized model, so that logits are the same."""
    gap = float(
        (logits(load(case), token_ids(case.folder)) - dense_logits(case.folder)).abs().max()
    )
    record(case, "run", gap=gap)
    assert gap == 0


@pytest.mark.cases(("gguf:",), only=is_unknown)
def test_refused(case, record):
    record(case, "refused", reason=REFUSAL)
    with pytest.raises(ValueError, match=REFUSAL):
        load(case)
