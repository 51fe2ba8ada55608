"""Which blocks are tuned, end to end; and that a run that tunes none is no success."""

from __future__ import annotations

import llmcompressor
import pytest
import torch
import transformers
from conftest import quantize, tiny_llama, tiny_tokenizer, token_samples, weight_scheme
from helpers import quantized_layers
from test_resume_passed_state import gemma3n
from transformers.models.deberta_v2 import modeling_deberta_v2  # noqa: F401

from autoround_modifier import AutoRoundModifier, AutoSchemeModifier, RecipeError, choose_schemes
from autoround_modifier.modifiers.block_quantizer import BlockQuantizer
from autoround_modifier.tuning import Tuner

# DeBERTa is imported above: `torch.jit.script`, which it calls, fails once a model was traced.
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def built(name: str, folder, dtype=torch.bfloat16, **fields):
    """:param name: of the classes: prefix and rest, ``Mamba.ForCausalLM``"""
    prefix, kind = name.split(".")
    config = getattr(transformers, f"{prefix}Config")(**{**SMALL, **fields})
    model_class = getattr(transformers, prefix + kind)
    torch.manual_seed(0)
    model_class(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model_class.from_pretrained(folder, dtype=dtype)


def modifier(**fields) -> AutoRoundModifier:
    groups = {"group_0": weight_scheme(4, group_size=None)}
    defaults = {
        "iters": 2,
        "batch_size": 4,
        "ignore": ["lm_head"],
        "config_groups": groups,
        "engine": "none",  # no engine loads packed layers of Mamba
    }
    return AutoRoundModifier(**{**defaults, **fields})


def names(recipe: AutoRoundModifier) -> list[str]:
    return [report.name for report in recipe.block_reports]


MODELS = {
    "Mamba.ForCausalLM": ("backbone.layers", {"state_size": 8, "time_step_rank": 8}),
    "BioGpt.ForCausalLM": ("biogpt.layers", {}),
    "Bert.Model": ("encoder.layer", {}),
    "XLMRoberta.Model": ("encoder.layer", {}),
    "ModernBert.Model": ("layers", {"cls_token_id": 1, "sep_token_id": 1}),
    "DebertaV2.Model": ("encoder.layer", {}),
    "RobertaPreLayerNorm.Model": ("encoder.layer", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_tuned_once(name, tmp_path):
    prefix, fields = MODELS[name]
    model = built(name, tmp_path, **fields)
    recipe = modifier(ignore=["lm_head", "re:.*pooler.*", "output_projection"])
    quantize(model, recipe)
    assert names(recipe) == [f"{prefix}.0", f"{prefix}.1"]
    assert all(layer.startswith(f"{prefix}.") for layer in quantized_layers(model))


@pytest.mark.parametrize("name", ["BioGpt.ForCausalLM", "Mamba.ForCausalLM"])
def test_the_host_cuts_at_the_same_blocks(name, tmp_path, monkeypatch):
    """Under LLM-Compressor's own `oneshot` too: block by block, not all at once."""
    calls = []
    original = BlockQuantizer.quantize

    def spy(self, blocks):
        calls.append([len(self.store.recorded()), *(self.names[block] for block in blocks)])
        original(self, blocks)

    monkeypatch.setattr(BlockQuantizer, "quantize", spy)
    prefix, fields = MODELS[name]
    llmcompressor.oneshot(
        model=built(name, tmp_path, **fields),
        recipe=modifier(),
        dataset=token_samples(),
        processor=tiny_tokenizer(),
        shuffle_calibration_samples=False,
    )
    assert calls == [[1, f"{prefix}.0"], [1, f"{prefix}.1"]]


def test_layers_that_blocks_share_are_quantized_once(tmp_path, monkeypatch):
    """ALBERT runs one block several times; the second time its weights are quantized already."""
    model = built("Albert.Model", tmp_path, embedding_size=64, num_hidden_layers=3)
    tuned = []
    original = Tuner.run
    monkeypatch.setattr(Tuner, "run", lambda self, *x: tuned.append(1) or original(self, *x))
    quantize(model, modifier(ignore=["re:.*pooler.*"]))
    assert len(tuned) == 1


# ------------------------------------------------------------------ nothing to tune


@pytest.fixture
def never_forward(monkeypatch):
    def refused(self, *args, **kwargs):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(torch.nn.Linear, "forward", refused)


@pytest.mark.parametrize(
    ("fields", "targets", "message"),
    [
        ({}, ["LlamaDecoderlayer"], "match no module; did you mean `LlamaDecoderLayer`"),
        ({}, ["Linear"], "single layers, not blocks"),
        (
            {"config_groups": {"group_0": weight_scheme(targets=("lm_head",))}, "ignore": []},
            None,
            "no targeted layer is inside of a block.*lm_head.*LlamaDecoderLayer.*opt_rtn",
        ),
    ],
)
def test_a_run_that_would_tune_no_block_is_refused(fields, targets, message, never_forward):
    with pytest.raises(RecipeError, match=message):
        quantize(tiny_llama(), modifier(**fields), sequential_targets=targets)


def test_other_users_of_blocks_refuse_the_same(never_forward):
    recipe = [
        AutoSchemeModifier(avg_bits=6, options=["W4A16G32", "W8A16G32"], cache_dir=False),
        AutoRoundModifier(iters=2),
    ]
    with pytest.raises(RecipeError, match="match no module"):
        quantize(tiny_llama(), recipe, sequential_targets=["LlamaDecoderlayer"])
    with pytest.raises(RecipeError, match="match no module"):
        choose_schemes(
            tiny_llama(),
            ["W4A16G32", "W8A16G32"],
            6,
            token_samples(2),
            sequential_targets=["Llama"],
        )


def test_layers_outside_of_blocks_alone_are_searched_if_no_tuning_is_asked_for():
    groups = {"group_0": weight_scheme(targets=("lm_head",))}
    model = quantize(
        tiny_llama(), modifier(preset="opt_rtn", iters=None, config_groups=groups, ignore=[])
    )
    assert list(quantized_layers(model)) == ["lm_head"]


def test_blocks_that_do_not_run_are_no_success():
    model = tiny_llama()
    model.model.unused = torch.nn.ModuleList([tiny_llama(num_layers=1).model.layers[0]])
    with pytest.raises(RecipeError, match=r"`iters` is 2, but no block was tuned.*opt_rtn"):
        quantize(model, modifier(), sequential_targets=[r"re:.*unused\.0$"])


def test_a_model_without_a_head_is_refused_where_predictions_are_needed(tmp_path):
    with pytest.raises(RecipeError, match="BertModel predicts no tokens"):
        choose_schemes(built("Bert.Model", tmp_path), ["W4A16G32", "W8A16G32"], 6, token_samples(2))


# ------------------------------------------------------------------ shared keys and values


def ignored() -> list[str]:
    return ["lm_head", "re:.*altup.*", "re:.*per_layer_model_projection"]


def test_the_pipeline_for_shared_keys_and_values_is_chosen(tmp_path, log):
    recipe = modifier(ignore=ignored())
    quantize(gemma3n(tmp_path / "model"), recipe)
    assert len(recipe.block_reports) == 4
    assert any("the pipeline is `basic`" in line for line in log)


def test_another_pipeline_for_shared_keys_and_values_is_refused(tmp_path, never_forward):
    model = gemma3n(tmp_path / "model")
    with pytest.raises(RecipeError, match="`sequential` does not pass on"):
        quantize(model, modifier(ignore=ignored()), pipeline="sequential")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(RecipeError, match="`independent` does not pass on"):
        quantize(str(tmp_path / "model"), modifier(ignore=ignored()), pipeline="independent")


def test_the_host_is_stopped_before_anything_is_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(Tuner, "run", None)
    model = gemma3n(tmp_path / "model")
    with pytest.raises(RecipeError, match="give `oneshot` `pipeline='basic'`"):
        llmcompressor.oneshot(
            model=model,
            recipe=modifier(ignore=ignored()),
            dataset=token_samples(),
            processor=tiny_tokenizer(),
        )
    assert not quantized_layers(model)
