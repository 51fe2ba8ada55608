"""Exported checkpoints as auto-round's own loader in Transformers reads them."""

from __future__ import annotations

import pytest
import torch
from test_export import tuned
from transformers import AutoModelForCausalLM

from autoround_modifier import export, quantized_weights


@pytest.mark.parametrize(
    ("bits", "symmetric", "size"),
    [
        (2, True, 32),
        (2, False, 32),
        (3, True, None),
        (3, False, 32),
        (4, True, 32),
        (8, True, None),
        (8, False, 32),
    ],
)
def test_auto_round_reads_the_same_weights(bits, symmetric, size, tmp_path):
    source = tuned((bits, symmetric, size)).folder
    export(source, "auto_round", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    for name, weight in quantized_weights(source).items():
        layer = model.get_submodule(name)
        assert type(layer).__module__.startswith("auto_round_extension")
        identity = torch.eye(layer.infeatures, dtype=torch.float16)
        values = weight.values.float() - weight.zero_point.float().repeat_interleave(
            weight.grouping.group_size, 1
        )
        expected = weight.scale.float().repeat_interleave(weight.grouping.group_size, 1) * values
        # It multiplies in float16, in which a product has 11 digits
        assert torch.equal(layer(identity).T, expected.to(torch.float16)), name
