"""What works without a recipe, and what is public."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_tokenizer, token_samples, weight_scheme
from helpers import integers, quantized_layers

import autoround_modifier
from autoround_modifier import (
    AutoRoundModifier,
    CalibrationError,
    Choice,
    RecipeError,
    SchemeError,
    choose_schemes,
    distill,
    evaluate,
    oneshot,
    quantize,
    quantized_weights,
)

TOKENIZER = {"tokenizer": tiny_tokenizer()}


def samples(num: int = 8):
    return token_samples(num).with_format("torch")


def test_quantize_is_oneshot_with_a_modifier():
    groups = {"group_0": weight_scheme(2)}
    recipe = AutoRoundModifier(config_groups=groups, ignore=["lm_head"], iters=4, batch_size=4)
    expected = oneshot(model=tiny_llama(), recipe=recipe, dataset=token_samples(8), **TOKENIZER)
    model = quantize(
        tiny_llama(), groups, token_samples(8), iters=4, batch_size=4, oneshot_arguments=TOKENIZER
    )
    assert len(quantized_layers(model)) == 14
    for name, layer in quantized_layers(model).items():
        assert torch.equal(integers(layer), integers(expected.get_submodule(name)))


def test_quantize_by_the_name_of_a_scheme_and_save(tmp_path):
    folder = tmp_path / "saved"
    quantize(
        tiny_llama(),
        "FP8_DYNAMIC",
        preset="rtn",
        output_dir=folder,
        oneshot_arguments=TOKENIZER,
    )
    weights = quantized_weights(folder)
    assert len(weights) == 14
    assert weights["model.layers.0.mlp.up_proj"].values.dtype == torch.float8_e4m3fn


def test_choose_then_quantize():
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choice = choose_schemes(model, ["W2A16G32", "W4A16G32"], 3.6, samples(), batch_size=4)
    assert isinstance(choice, Choice)
    assert 2.5 < choice.avg_bits() <= 3.6
    assert {"W2A16G32", "W4A16G32"} == set(choice.schemes)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())

    quantize(model, choice, token_samples(8), preset="opt_rtn", oneshot_arguments=TOKENIZER)
    bits = {
        name: layer.quantization_scheme.weights.num_bits
        for name, layer in quantized_layers(model).items()
    }
    chosen = {layer: int(scheme[1]) for unit, scheme in choice.pairs for layer in unit.layers}
    assert bits == chosen


def test_choose_takes_batches_and_samples_alike():
    one_by_one = choose_schemes(tiny_llama(), ["W2A16G32", "W4A16G32"], 3.6, samples())
    batches = [samples()[:4], samples()[4:]]
    together = choose_schemes(tiny_llama(), ["W2A16G32", "W4A16G32"], 3.6, batches)
    assert one_by_one.schemes == together.schemes
    assert together.score == pytest.approx(one_by_one.score, rel=0.02)


def test_choose_refuses_before_anything_runs(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(SchemeError, match=r"from 2\.5243 to 4\.5243 bits"):
        choose_schemes(model, ["W2A16G32", "W4A16G32"], 2.0, samples())
    with pytest.raises(SchemeError, match="option W2A16G48"):
        choose_schemes(model, ["W2A16G48", "W4A16G32"], 3.0, samples())
    with pytest.raises(CalibrationError, match="empty"):
        choose_schemes(model, ["W2A16G32", "W4A16G32"], 3.0, [])


def test_distill_brings_the_model_closer():
    original = tiny_llama(torch.float32)
    model = quantize(
        tiny_llama(torch.float32),
        {"group_0": weight_scheme(2)},
        token_samples(8),
        preset="opt_rtn",
        oneshot_arguments=TOKENIZER,
    )
    values = {name: integers(layer).clone() for name, layer in quantized_layers(model).items()}
    result = distill(model, original, samples(), iters=10, lr=0.01, holdout_fraction=0.0)
    assert result.kept
    assert result.final_kl < result.initial_kl
    for name, layer in quantized_layers(model).items():
        assert torch.equal(integers(layer), values[name])


def test_distill_refuses_an_unquantized_model():
    with pytest.raises(RecipeError, match="no linear layer with a quantization scheme"):
        distill(tiny_llama(), tiny_llama(), samples())


def test_distill_refuses_a_model_that_was_saved(tmp_path):
    model = quantize(
        tiny_llama(), {"group_0": weight_scheme(2)}, preset="rtn", oneshot_arguments=TOKENIZER
    )
    model.save_pretrained(tmp_path, save_compressed=True)
    with pytest.raises(RecipeError, match=r"compressed the weights.*model\.layers\.0.*q_proj"):
        distill(model, tiny_llama(), samples())


def test_evaluate():
    ids = token_samples(4)["input_ids"]
    same = evaluate(tiny_llama(), tiny_llama(), ids)
    assert (same.kl, same.top1) == (0.0, 1.0)
    other = evaluate(tiny_llama(), tiny_llama(seed=1), torch.tensor(ids))
    assert other.kl > 0.1


def test_quantized_weights_refuses_an_unquantized_model():
    with pytest.raises(RecipeError, match="no quantized linear layer"):
        quantized_weights(tiny_llama())


def test_public_names_are_declared_documented_and_typed():
    for name in autoround_modifier.__all__:
        value = getattr(autoround_modifier, name)
        if callable(value):
            assert inspect.getdoc(value), name
    assert sorted(autoround_modifier.__all__) == sorted(set(autoround_modifier.__all__))
    errors = importlib.import_module("autoround_modifier.errors")
    declared = {name for name in errors.__all__ if name.endswith("Error")}
    assert declared <= set(autoround_modifier.__all__)
    assert (Path(autoround_modifier.__file__).parent / "py.typed").exists()
