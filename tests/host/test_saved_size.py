"""host/saved_size.py: what compressed-tensors makes of a layer."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.initialize import (
    initialize_module_for_quantization,
)
from torch import nn

from autoround_modifier.host.saved_size import saved_bits


def compressed(preset: str, layer: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    initialize_module_for_quantization(layer, preset_name_to_scheme(preset, ["Linear"]))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(0 if name == "weight" or "zero_point" in name else 1)
    compress_module(layer)
    return {name: (x.dtype, tuple(x.shape)) for name, x in layer.state_dict().items()}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (
            "W4A16",
            {
                "weight_packed": (torch.int32, (8, 32)),
                "weight_scale": (torch.bfloat16, (8, 2)),
                "weight_shape": (torch.int64, (2,)),
            },
        ),
        (
            "W4A16_ASYM",
            {
                "weight_packed": (torch.int32, (8, 32)),
                "weight_scale": (torch.bfloat16, (8, 2)),
                "weight_zero_point": (torch.int32, (1, 2)),
                "weight_shape": (torch.int64, (2,)),
            },
        ),
        (
            "NVFP4A16",
            {
                "weight_packed": (torch.uint8, (8, 128)),
                "weight_scale": (torch.float8_e4m3fn, (8, 16)),
                "weight_global_scale": (torch.float32, (1,)),
            },
        ),
        (
            "MXFP8A16",
            {
                "weight": (torch.float8_e4m3fn, (8, 256)),
                "weight_scale": (torch.uint8, (8, 8)),
            },
        ),
    ],
)
def test_tensors_of_a_saved_layer(preset, expected):
    layer = nn.Linear(256, 8, bias=False, dtype=torch.bfloat16)
    assert compressed(preset, layer) == expected
    layer = nn.Linear(256, 8, bias=False, dtype=torch.bfloat16)
    bits = sum(torch.empty(shape, dtype=dtype).nbytes * 8 for dtype, shape in expected.values())
    assert saved_bits(layer, preset_name_to_scheme(preset, ["Linear"])) == bits


def test_embeddings_are_packed_too():
    assert compressed("W4A16", nn.Embedding(8, 256, dtype=torch.bfloat16)).keys() == {
        "weight_packed",
        "weight_scale",
        "weight_shape",
    }


@pytest.mark.parametrize("preset", ["W4A16_ASYM", "NVFP4", "FP8_BLOCK", "MXFP4", "W4AFP8"])
def test_schemes_survive_as_text(preset):
    """But for the dtype of zero points that are not saved."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    again = QuantizationScheme.model_validate_json(scheme.model_dump_json())
    assert again.model_dump_json() == scheme.model_dump_json()
    left_out = {"zp_dtype"} if scheme.weights.symmetric else set()
    assert again.weights.model_dump(exclude=left_out) == scheme.weights.model_dump(exclude=left_out)


def test_without_weights_the_layer_stays():
    layer = nn.Linear(256, 8, dtype=torch.bfloat16)
    scheme = preset_name_to_scheme("UNQUANTIZED", ["Linear"])
    assert scheme.weights is None
    assert saved_bits(layer, scheme) == 256 * 8 * 16
