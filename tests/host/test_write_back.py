"""host/write_back.py: what is written back is what compressed-tensors saves."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.initialize import (
    initialize_module_for_quantization,
)
from torch import nn

from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.host.packed import unpack_integers
from autoround_modifier.host.schemes import QuantizationArgs, weight_spec
from autoround_modifier.host.write_back import write_back


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_the_saved_integers_are_those_that_were_written(num_bits, symmetric):
    args = QuantizationArgs(num_bits=num_bits, symmetric=symmetric, strategy="group", group_size=32)
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    initialize_module_for_quantization(layer, QuantizationScheme(targets=["Linear"], weights=args))
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1)
    values = torch.randint(low, high, (32, 64), dtype=torch.int8)
    zero_point = torch.randint(low, high, (32, 2), dtype=torch.int8) * (not symmetric)
    scale = (torch.rand(32, 2) + 0.01).bfloat16()
    spec = weight_spec(args)
    parts = {"values": values.clone(), "scale": scale, "zero_point": zero_point}
    weight = QuantizedWeight(parts, spec.grid(torch.bfloat16), spec.grouping((32, 64)))
    moved = write_back(layer, weight, args)
    assert (weight.values != values).sum() == moved
    assert moved == 0 or num_bits == 8

    compress_module(layer)
    saved = unpack_integers(layer.weight_packed, num_bits, (32, 64))
    assert torch.equal(saved, weight.values)
    assert torch.equal(layer.weight_scale, scale)
    if not symmetric:
        packed = layer.weight_zero_point
        assert torch.equal(unpack_integers(packed, num_bits, (32, 2), 0), zero_point)
