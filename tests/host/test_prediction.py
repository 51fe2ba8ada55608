"""host/prediction.py: what saving will write, before anything runs."""

from __future__ import annotations

import math

import pytest
from conftest import quantize, tiny_llama, weight_scheme
from tiny_mixtures import tiny_mixture

from autoround_modifier import AutoRoundModifier
from autoround_modifier.checkpoints.saved_files import read_layout
from autoround_modifier.errors import RecipeError
from autoround_modifier.host import prediction
from autoround_modifier.host.prediction import predict_layers, predict_layout, quantization_section
from autoround_modifier.host.saved_names import name_experts_as_released

SCHEMES = ("W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_BLOCK", "NVFP4", "MXFP4", "MXFP8")


def check_prediction(model, recipe, folder) -> None:
    name_experts_as_released(model)
    predicted = predict_layout(model, [recipe.resolved_config])
    quantize(model, recipe, output_dir=folder)
    saved = read_layout(folder)
    assert predicted.tensors == saved.tensors
    for name in ("config_groups", "ignore", "format", "quant_method", "quantization_status"):
        assert predicted.quantization[name] == saved.quantization[name]
    assert predicted.config["architectures"] == saved.config["architectures"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_and_config_are_those_that_are_saved(scheme, tmp_path):
    model = tiny_llama(hidden_size=128)
    recipe = AutoRoundModifier(scheme=scheme, preset="rtn", ignore=["lm_head"])
    check_prediction(model, recipe, tmp_path)


def test_tied_embeddings_are_one_tensor(tmp_path):
    recipe = AutoRoundModifier(
        preset="rtn", ignore=["lm_head"], config_groups={"group_0": weight_scheme(4)}
    )
    check_prediction(tiny_llama(tied=True), recipe, tmp_path)


@pytest.mark.parametrize("prefix", ["Qwen3Moe", "Mixtral"])
def test_mixtures(prefix, tmp_path):
    recipe = AutoRoundModifier(
        preset="rtn",
        ignore=["lm_head", r"re:.*\.gate$"],
        config_groups={
            "attention": {**weight_scheme(8), "targets": [r"re:.*self_attn\..*_proj$"]},
            "experts": {**weight_scheme(4), "targets": [r"re:.*mlp\..*_proj$"]},
        },
    )
    check_prediction(tiny_mixture(tmp_path / "original", prefix), recipe, tmp_path / "saved")


def test_layers_have_their_shapes_schemes_and_saved_names(tmp_path):
    model = tiny_mixture(tmp_path / "original", "Mixtral")
    recipe = AutoRoundModifier(
        preset="rtn",
        ignore=["lm_head", r"re:.*\.gate$"],
        config_groups={"group_0": {**weight_scheme(2), "targets": ["Linear"]}},
    )
    name_experts_as_released(model)
    layout, layers = predict_layers(model, [recipe.resolved_config])
    packed = {name.removesuffix(".weight_packed") for name in layout.tensors if "packed" in name}
    assert set(layers) == packed
    for name, module in model.named_modules():
        if name in layers:
            assert layers[name].shape == tuple(module.weight.shape)
    assert any("experts.0.w1" in name for name in layers)
    assert {layer.scheme.weights.num_bits for layer in layers.values()} == {2}


def test_tensors_that_cannot_get_the_names_of_the_release_are_refused(monkeypatch):
    """Transformers would fail at saving, after the run."""

    def fail(model, state):
        raise IndexError("Dimension out of range")

    monkeypatch.setattr(prediction, "revert_weight_conversion", fail)
    recipe = AutoRoundModifier(config_groups={"group_0": weight_scheme(4)}, iters=1)
    with pytest.raises(RecipeError, match=r"cannot save .*LlamaForCausalLM.*Dimension"):
        quantize(tiny_llama(), recipe)


def test_nothing_is_said_of_a_model_that_is_not_quantized():
    assert quantization_section(tiny_llama()) is None


def test_infinity_in_the_configuration():
    """As in Bamba's ``time_step_limit``; Transformers writes it as a dict."""
    model = tiny_llama()
    model.config.time_step_limit = [0.0, math.inf]
    assert predict_layout(model, []).config["time_step_limit"] == [0.0, math.inf]
