"""A subclass of AutoRoundModifier runs the same algorithm, or is refused."""

from __future__ import annotations

import llmcompressor
import pytest
import torch
from conftest import quantize, tiny_llama, tiny_tokenizer, token_samples, weight_scheme
from helpers import integers, quantized_layers
from llmcompressor.modifiers import ModifierFactory

from autoround_modifier import AutoRoundModifier, RecipeError
from autoround_modifier.host.lifecycle import Recipe, register_modifier

FIELDS = {
    "iters": 8,
    "batch_size": 4,
    "ignore": ["lm_head"],
    "config_groups": {"group_0": weight_scheme(2)},
}
TEXT = """
quant_stage:
  quant_modifiers:
    Mine:
      iters: 8
      batch_size: 4
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 2, type: int, symmetric: true, strategy: group, group_size: 32}
"""


class Mine(AutoRoundModifier):
    """The same under another name."""


def same_name() -> AutoRoundModifier:
    return type("AutoRoundModifier", (AutoRoundModifier,), {})(**FIELDS)


def found(recipe) -> dict[str, torch.Tensor]:
    """:return: the integers of a model with three blocks, each of which feeds the next"""
    model = tiny_llama(num_layers=3)
    quantize(model, recipe)
    return {name: integers(layer) for name, layer in quantized_layers(model).items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return found(AutoRoundModifier(**FIELDS))


@pytest.mark.parametrize("kind", ["modifier", "list", "recipe", "text", "file", "same name"])
def test_a_subclass_gives_the_same_integers(kind, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(ModifierFactory, "_registered_registry", {})
    register_modifier(Mine)
    (tmp_path / "recipe.yaml").write_text(TEXT)
    recipes = {
        "modifier": lambda: Mine(**FIELDS),
        "list": lambda: [Mine(**FIELDS)],
        "recipe": lambda: Recipe.create_instance(Mine(**FIELDS)),
        "text": lambda: TEXT,
        "file": lambda: tmp_path / "recipe.yaml",
        "same name": same_name,
    }
    ours = found(recipes[kind]())
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(ours[name], values), name


def test_quantized_inputs_give_others(expected):
    """Which the test above would see: without the class's name the next block is fed them."""
    model, recipe = tiny_llama(num_layers=3), Mine(**FIELDS)
    recipe.run_without_error_propagation()  # not so
    host_oneshot(model, recipe)
    differs = {
        name
        for name, layer in quantized_layers(model).items()
        if not torch.equal(integers(layer), expected[name])
    }
    assert differs
    assert not [name for name in differs if name.startswith("model.layers.0.")]


def host_oneshot(model, recipe) -> None:
    llmcompressor.oneshot(
        model=model,
        recipe=recipe,
        dataset=token_samples(),
        processor=tiny_tokenizer(),
        shuffle_calibration_samples=False,
    )


def test_the_host_s_own_oneshot_is_refused_before_the_first_forward_pass():
    model, calls = tiny_llama(), []
    model.register_forward_pre_hook(lambda module, args: calls.append(args))
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: calls.append(args))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(RecipeError, match=r"Mine is an AutoRoundModifier under another name.*"):
        host_oneshot(model, Mine(**FIELDS))
    assert calls == []
    assert {name for name, _ in model.named_parameters()} == before.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_host_s_own_oneshot_runs_the_class_itself(expected):
    model = tiny_llama(num_layers=3)
    host_oneshot(model, AutoRoundModifier(**FIELDS))
    for name, layer in quantized_layers(model).items():
        assert torch.equal(integers(layer), expected[name])
