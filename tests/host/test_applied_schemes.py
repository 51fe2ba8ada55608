"""host/applied_schemes.py: schemes that a model has already."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from conftest import quantize, tiny_llama, weight_scheme
from helpers import quantized_layers
from llmcompressor.modifiers.quantization import QuantizationModifier

from autoround_modifier.host.applied_schemes import (
    disable_unfinished,
    forget_carriers,
    forget_scheme,
    forget_schemes,
    modules_of,
    quantized_names,
)
from autoround_modifier.host.lifecycle import apply_calibration_status

IDS = torch.arange(3, 15)[None]


def with_schemes(kv_cache: bool = False):
    """A model as it is between initialisation and calibration: scales are not filled in."""
    model = tiny_llama()
    cache = {"num_bits": 8, "type": "float", "dynamic": False} if kv_cache else None
    static = {"input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False}}
    config = QuantizationConfig(
        config_groups={"group_0": weight_scheme() | static},
        ignore=["lm_head"],
        kv_cache_scheme=cache,
    )
    apply_quantization_config(model, config)
    return model


def test_what_was_quantized_before():
    model = with_schemes()
    assert quantized_names(tiny_llama()) == []
    assert quantized_names(model) == []  # given a scheme, by a modifier of the same recipe
    apply_calibration_status(model.model.layers[1].mlp.down_proj)
    assert quantized_names(model) == ["model.layers.1.mlp.down_proj"]
    finished = quantize(
        tiny_llama(), QuantizationModifier(config_groups={"g": weight_scheme()}, ignore=["lm_head"])
    )
    assert len(quantized_names(finished)) == 14


@pytest.mark.parametrize("kv_cache", [False, True])
def test_a_scheme_that_is_forgotten_leaves_nothing(kv_cache):
    original, model = tiny_llama(), with_schemes(kv_cache)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            forget_scheme(module)
    assert set(model.state_dict()) == set(original.state_dict())
    assert not quantized_layers(model)
    assert torch.equal(model(IDS).logits, original(IDS).logits)


def test_schemes_of_modifiers_of_this_recipe_are_kept():
    model = with_schemes()
    mlp = QuantizationModifier(config_groups={"g": weight_scheme(targets=("re:.*mlp.*_proj$",))})
    forget_schemes(model, modules_of(model, [mlp]))
    assert len(quantized_layers(model)) == 6
    assert all(".mlp." in name for name in quantized_layers(model))


def test_unfinished_layers_compute_without_their_scales():
    model = with_schemes()
    for layer in quantized_layers(model).values():
        layer.weight_scale.data.fill_(float("nan"))
    assert not torch.isfinite(model(IDS).logits).all()
    disable_unfinished(model)
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)


def test_layers_that_were_carriers_are_known_as_quantized():
    model = quantize(tiny_llama(), QuantizationModifier(config_groups={"a": weight_scheme()}))
    layers = quantized_layers(model)
    forget_carriers(layers.values())
    assert not quantized_layers(model)
    assert quantized_names(model) == list(layers)
    assert quantized_names(tiny_llama()) == []
