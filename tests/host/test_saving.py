"""LLM-Compressor's `save_pretrained`, what runs after it, and what a failure leaves."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from conftest import quantize, tiny_llama, weight_scheme
from llmcompressor.core import active_session, reset_session
from llmcompressor.recipe import Recipe
from torch import nn

from autoround_modifier import AutoRoundModifier, SavingError
from autoround_modifier.host.saving import (
    UNFINISHED_PREFIX,
    check_generation_config,
    compressed_tensors_of,
    finish_when_saved,
    prepare_compression,
    recipe_text,
)
from autoround_modifier.host.schemes import QuantizationScheme


@pytest.fixture
def model():
    reset_session()
    active_session().lifecycle.recipe = Recipe()
    return tiny_llama(num_layers=1)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_runs_after_saving_sees_all_files_and_can_change_them(model, tmp_path):
    seen = []

    def finish(saved, folder):
        assert saved is model
        seen.extend(names(folder))
        assert not (tmp_path / "out" / "config.json").exists()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"finished": True}))

    finish_when_saved(model, lambda *_: pytest.fail("it was replaced"))
    finish_when_saved(model, finish)
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    assert names(tmp_path / "out") == seen
    assert {"config.json", "model.safetensors", "recipe.yaml"} <= set(seen)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["finished"]


def test_a_failed_save_leaves_nothing(model, tmp_path):
    finish_when_saved(model, lambda *_: None)
    model.generation_config.max_new_tokens = 0
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.save_pretrained(tmp_path / "new" / "out")
    assert names(tmp_path) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.save_pretrained(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


def test_what_was_saved_is_kept_if_finishing_fails(model, tmp_path):
    def finish(saved, folder):
        raise RuntimeError("not finished")

    finish_when_saved(model, finish)
    with pytest.raises(RuntimeError, match="not finished"):
        model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= set(names(tmp_path))
    assert not [name for name in names(tmp_path) if name.startswith(UNFINISHED_PREFIX)]


def test_an_earlier_checkpoint_is_replaced_and_other_files_stay(model, tmp_path):
    finish_when_saved(model, lambda *_: None)
    (tmp_path / "notes.txt").write_text("mine")
    killed = tmp_path / f"{UNFINISHED_PREFIX}0123"
    killed.mkdir()
    (killed / "model.safetensors").write_text("a part")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    sharded = set(names(tmp_path))
    assert "model.safetensors.index.json" in sharded
    assert "model.safetensors" not in sharded
    model.save_pretrained(tmp_path)
    weights = [name for name in names(tmp_path) if "safetensors" in name]
    assert weights == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not killed.exists()


def test_a_model_that_was_saved_twice_still_runs(tmp_path):
    """compressed-tensors adds a hook each time, of which one decompresses the model."""
    model = tiny_llama(num_layers=1)
    recipe = AutoRoundModifier(
        preset="rtn", ignore=["lm_head"], config_groups={"a": weight_scheme()}
    )
    quantize(model, recipe)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()


def test_uploading_while_saving_is_refused(model, tmp_path):
    finish_when_saved(model, lambda *_: None)
    with pytest.raises(ValueError, match="upload_folder"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_sampling_without_do_sample_is_saved_as_it_is_meant(model, log, tmp_path):
    """As Llama-2-chat and Vicuna are released."""
    model.generation_config.temperature = 0.9
    model.generation_config.top_p = 0.6
    check_generation_config(model)
    assert any("do_sample" in line for line in log)
    finish_when_saved(model, lambda *_: None)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.9, 0.6)
    assert not model.generation_config.do_sample  # in memory it generates as before


def test_a_generation_config_that_cannot_be_saved_is_refused(model):
    check_generation_config(model)
    model.generation_config.max_new_tokens = 0
    with pytest.raises(SavingError, match="max_new_tokens"):
        check_generation_config(model)


def test_a_recipe_with_several_modifiers_of_one_class_is_read_again(tmp_path):
    modifiers = [
        AutoRoundModifier(preset="rtn", config_groups={"a": weight_scheme(bits, targets=[target])})
        for bits, target in ((4, "re:.*self_attn.*"), (8, "re:.*mlp.*"), (2, "lm_head"))
    ]
    text = recipe_text(modifiers, "default", "")
    again = Recipe.create_instance(text).modifiers
    fields = [one.model_dump(exclude={"group"}) for one in modifiers]
    assert [one.model_dump(exclude={"group"}) for one in again] == fields

    (tmp_path / "recipe.yaml").write_text(recipe_text(modifiers[:1], "default", ""))
    both = yaml.safe_load(recipe_text(modifiers[1:], "default", str(tmp_path)))
    assert list(both) == ["default_stage_0", "default_stage_1"]


def test_a_layer_outside_of_a_model_is_compressed():
    layer = nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)
    scheme = QuantizationScheme.model_validate(weight_scheme(4))
    prepare_compression(layer, scheme)
    layer.weight_scale.data.fill_(0.01)
    tensors = compressed_tensors_of(layer)
    assert set(tensors) == {"weight_packed", "weight_scale", "weight_shape"}
    assert scheme.format == "pack-quantized"


def test_llm_compressor_copies_no_layers_itself(model, tmp_path, monkeypatch):
    """`modifiers/mtp.py` does."""
    monkeypatch.setattr(model.config, "num_mtp_layers", 1, raising=False)
    finish_when_saved(model, lambda *_: None)
    model.save_pretrained(tmp_path)
    assert "model.safetensors.index.json" not in names(tmp_path)
