"""host/schemes.py: the vocabulary of compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from torch import nn

from autoround_modifier.formats import WeightSpec
from autoround_modifier.host import schemes

INTEGERS = [f"W{bits}A16" for bits in range(2, 9)]
SPECS = {
    **{
        name: WeightSpec("int", int(name[1]), True, "group", 128)
        for name in [*INTEGERS, "W4A8", "W4AFP8", "W2A8"]
    },
    "W4A16_ASYM": WeightSpec("int", 4, False, "group", 128),
    "W8A8": WeightSpec("int", 8, True, "channel"),
    "INT8": WeightSpec("int", 8, True, "channel"),
    "FP8": WeightSpec("float", 8, True, "tensor"),
    "FP8_DYNAMIC": WeightSpec("float", 8, True, "channel"),
    "FP8_BLOCK": WeightSpec("float", 8, True, "block", block=(128, 128)),
    "MXFP4A16": WeightSpec("float", 4, True, "group", 32, power_of_two_scale=True),
    "MXFP8A16": WeightSpec("float", 8, True, "group", 32, power_of_two_scale=True),
    "NVFP4A16": WeightSpec("float", 4, True, "group", 16, global_scale=True),
    "NVFP4": WeightSpec("float", 4, True, "group", 16, global_scale=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_presets(name):
    assert name in schemes.scheme_names()
    assert schemes.is_preset_scheme(name)
    scheme = schemes.preset_name_to_scheme(name, ["Linear"])
    assert scheme.targets == ["Linear"]
    assert schemes.unsupported_weights(scheme.weights) is None
    assert schemes.weight_spec(scheme.weights) == SPECS[name]


def test_names_that_are_no_presets():
    assert not schemes.is_preset_scheme("W9A16")
    assert schemes.is_preset_scheme("UNQUANTIZED")
    assert schemes.preset_name_to_scheme("UNQUANTIZED", ["Linear"]).weights is None


def test_a_scheme_is_new_each_time():
    one, other = (schemes.preset_name_to_scheme("W4A16", ["Linear"]) for _ in range(2))
    one.weights.num_bits = 2
    assert other.weights.num_bits == 4


def test_values_of_arguments():
    args = schemes.QuantizationArgs(
        num_bits=4,
        type="float",
        group_size=16,
        dynamic="local",
        strategy="tensor_group",
        scale_dtype="torch.float8_e4m3fn",
    )
    assert args.strategy == schemes.QuantizationStrategy.TENSOR_GROUP
    assert args.type == schemes.QuantizationType.FLOAT
    assert args.dynamic == schemes.DynamicType.LOCAL
    assert args.scale_dtype == torch.float8_e4m3fn
    # Schemes are compared: another modifier may have replaced them.
    assert args == args.model_copy()
    assert args != args.model_copy(update={"num_bits": 8})
    without = schemes.QuantizationArgs(num_bits=4)
    assert (without.strategy, without.symmetric, without.dynamic) == ("tensor", True, False)
    assert without.observer is without.scale_dtype is without.group_size is None


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "group"},
        {"strategy": "block"},
        {"strategy": "channel", "group_size": 32},
        {"strategy": "token"},
        {"num_bits": 4, "unknown": 1},
    ],
)
def test_arguments_that_do_not_fit_are_refused(fields):
    with pytest.raises(ValueError, match="validation error"):
        schemes.QuantizationArgs(**fields)


def test_a_config_keeps_its_groups_in_order():
    groups = {
        "group_1": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8}},
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}},
    }
    config = schemes.QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    assert list(config.config_groups) == ["group_1", "group_0"]
    assert config.ignore == ["lm_head"]
    dumped = config.model_dump(exclude=["quant_method"])
    again = schemes.QuantizationConfig.model_validate(dumped | {"quant_method": "x", "version": 1})
    assert again.config_groups == config.config_groups


def test_status_of_modules():
    names = [status.value for status in schemes.QuantizationStatus]
    assert {"initialized", "calibration", "frozen", "compressed"} <= set(names)
    assert schemes.QuantizationStatus.FROZEN >= schemes.QuantizationStatus.CALIBRATION


def test_attention_layers_that_cache():
    block = tiny_llama(num_layers=1).model.layers[0]
    assert schemes.is_cached_attention_module(block.self_attn)
    assert not schemes.is_cached_attention_module(block.mlp)
    assert not schemes.is_cached_attention_module(nn.Linear(2, 2))
