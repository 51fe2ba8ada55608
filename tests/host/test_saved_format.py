"""host/saved_format.py: how compressed-tensors lays integers out in a checkpoint."""

from __future__ import annotations

import pytest
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import preset_name_to_scheme
from torch import nn

from autoround_modifier.host.saved_format import choose_saved_format


class FalconLinear(nn.Linear):
    """A class derived from Linear."""


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("W4A16", "pack-quantized"),
        ("W8A16", "pack-quantized"),
        ("W8A8", "int-quantized"),
        ("W4A8", "int-quantized"),
        ("W2A8", "int-quantized"),
        ("W4AFP8", "int-quantized"),
        ("FP8", "float-quantized"),
        ("FP8_BLOCK", "float-quantized"),
        ("MXFP4A16", "mxfp4-pack-quantized"),
        ("MXFP8A16", "mxfp8-quantized"),
        ("NVFP4A16", "nvfp4-pack-quantized"),
    ],
)
def test_formats_that_compressed_tensors_chooses(preset, expected):
    scheme = preset_name_to_scheme(preset, ["Linear"])
    assert infer_module_format(nn.Linear, scheme).value == expected
    # Classes derived from Linear count as no linear layers.
    assert infer_module_format(FalconLinear, scheme).value == "dense"


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("W8A8", None),
        ("W4A8", None),
        ("W2A8", "pack-quantized"),
        ("W4AFP8", "pack-quantized"),
        ("W4A16", None),
        ("FP8", None),
    ],
)
def test_integers_are_packed_where_engines_read_no_others(preset, expected):
    scheme = preset_name_to_scheme(preset, ["Linear"])
    choose_saved_format(scheme)
    assert scheme.format == expected


def test_a_format_that_was_asked_for_stays():
    scheme = preset_name_to_scheme("W2A8", ["Linear"])
    scheme.format = "int-quantized"
    choose_saved_format(scheme)
    assert scheme.format == "int-quantized"


def test_derived_classes_are_saved_as_linear_layers():
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    choose_saved_format(scheme, FalconLinear)
    assert scheme.format == "pack-quantized"
