"""Each format's tensors of one layer, read back bit by bit: every code, scale and zero point."""

from __future__ import annotations

import itertools
import json

import export_readers
import pytest
import torch
from export_readers import Integers

from autoround_modifier.exports.auto_round_format import (
    auto_round_config,
    auto_round_tensors,
    packing_format,
)
from autoround_modifier.exports.awq import awq_config, awq_tensors
from autoround_modifier.exports.export_formats import FORMATS, check_format, check_scales
from autoround_modifier.exports.gptq import gptq_config, gptq_tensors, gptq_v1
from autoround_modifier.exports.integer_layers import IntegerLayer, IntegerSpec
from autoround_modifier.exports.mlx import mlx_config, mlx_fields, mlx_tensors

NAME = "model.layers.0.mlp.down_proj"
SIZES = (-1, 16, 32, 64, 128)
SHAPES = ((32, 128), (96, 256))
ROWS = list(itertools.product((2, 3, 4, 8), (True, False), SIZES, SHAPES))


def layer(bits: int, symmetric: bool, size: int, shape: tuple[int, int]) -> IntegerLayer:
    """Random, with the least and the greatest numbers of each kind, and scales of both signs."""
    generator = torch.Generator().manual_seed(bits)
    spec = IntegerSpec(NAME, *shape, bits, symmetric, size, "linear")
    groups = shape[1] // spec.features_per_scale
    codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    codes[0], codes[1], codes[:, -1] = 0, 2**bits - 1, 2**bits - 1
    scale = torch.randn(shape[0], groups, generator=generator).to(torch.bfloat16) / 16
    zeros = torch.full((shape[0], groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(2**bits, zeros.shape, generator=generator, dtype=torch.uint8)
        zeros[0], zeros[1], zeros[:, -1] = 0, 2**bits - 1, 0
    return IntegerLayer(spec, codes, scale, zeros)


def made(format: str, one: IntegerLayer) -> tuple[dict, dict[str, torch.Tensor]]:
    """:return: ``config.json`` and the tensors of the layer"""
    specs = [one.spec]
    if format == "gptq":
        return {"quantization_config": gptq_config(specs, [])}, gptq_tensors(one, gptq_v1(specs))
    if format == "awq":
        return {"quantization_config": awq_config(specs, [])}, awq_tensors(one)
    if format == "auto_round":
        config = {"quantization_config": auto_round_config(specs, [])}
        return config, auto_round_tensors(one, packing_format(specs))
    section = mlx_config(specs)
    return {"quantization": section, "quantization_config": section}, mlx_tensors(one)


@pytest.mark.parametrize("format", ["gptq", "awq", "auto_round", "mlx"])
def test_what_is_read_is_what_was_written(format, tmp_path):
    """All bits, symmetric or not, in groups and by channel, in two shapes."""
    held = 0
    for bits, symmetric, size, shape in ROWS:
        one = layer(bits, symmetric, size, shape)
        try:
            check_format(FORMATS[format], [one.spec], [])
            check_scales(FORMATS[format], [(one.spec, one.scale)])
        except ValueError:
            continue
        held += 1
        config, tensors = made(format, one)
        (tmp_path / "config.json").write_text(json.dumps(config))
        named = {f"{NAME}.{part}": tensor for part, tensor in tensors.items()}
        assert all(tensor.is_contiguous() for tensor in named.values())
        found = export_readers.read(tmp_path, named, NAME, bits)
        expected = Integers(one.codes.long(), one.scale, one.zero_point.long())
        label = (bits, symmetric, size, shape)
        assert torch.equal(found.codes, expected.codes), label
        assert torch.equal(found.scale.double(), expected.scale.double()), label
        assert torch.equal(found.zero_point.double(), expected.zero_point.double()), label
        assert torch.equal(found.dequantize(), expected.dequantize()), label
    assert held == {"gptq": 80, "awq": 20, "auto_round": 80, "mlx": 48}[format]


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {"rope_theta": 1e5}),
        (
            {"rope_parameters": {**SCALED, "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
            {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "rope_scaling": SCALED},
        ),
        (
            {
                "rope_parameters": BY_KIND,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "sliding_window_pattern": 3,
            },
        ),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 7.0}}, {}),
        ({"model_type": "gpt2"}, {}),
    ],
)
def test_names_that_mlx_lm_reads(config, expected):
    """It takes its defaults for fields that it does not find."""
    assert mlx_fields(config) == {**config, **expected}
    inside = {"text_config": config}
    assert mlx_fields(inside) == {"text_config": {**config, **expected}}
