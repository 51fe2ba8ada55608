"""What a saved checkpoint says of a model that is not what it was loaded from."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import quantize, tiny_llama, tiny_llama_folder, tiny_tokenizer, token_samples
from conftest import weight_scheme as scheme
from helpers import saved_tensors
from llmcompressor import oneshot as host_oneshot
from llmcompressor.recipe import Recipe
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from autoround_modifier import (
    AutoRoundModifier,
    CheckpointError,
    OutputExistsError,
    SavingError,
    oneshot,
)
from autoround_modifier.checkpoints.saved_config import changed_fields, with_changes
from autoround_modifier.checkpoints.saved_files import add_to_index, tensor_files
from autoround_modifier.checkpoints.source import find_source
from autoround_modifier.modifiers import finishing
from autoround_modifier.modifiers.generation import GenerationCheck
from autoround_modifier.runs.output_folder import check_output_folder


def modifier(targets=("Linear",), num_bits=4, **fields):
    fields = {"preset": "rtn", "ignore": ["lm_head"], **fields}
    groups = {"group_0": scheme(num_bits, targets=targets)}
    return AutoRoundModifier(config_groups=groups, **fields)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_resized_vocabulary_is_in_the_config(tmp_path):
    model = tiny_llama()
    model.resize_token_embeddings(200)
    quantize(model, modifier(), output_dir=tmp_path)
    assert config_of(tmp_path)["vocab_size"] == 200
    assert saved_tensors(tmp_path)["model.embed_tokens.weight"].shape[0] == 200
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = torch.tensor([[3, 4, 199]])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_removed_layers_are_in_the_config(tmp_path):
    model = tiny_llama(num_layers=3)
    model.model.layers = nn.ModuleList(model.model.layers[:2])
    model.config.num_hidden_layers = 2
    quantize(model, modifier(), output_dir=tmp_path)
    assert config_of(tmp_path)["num_hidden_layers"] == 2
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_all_else_in_the_config_is_the_source_s(tmp_path):
    source = tiny_llama_folder(torch.bfloat16, 2, 0, False)
    quantize(tiny_llama(), modifier(), output_dir=tmp_path)
    saved, original = config_of(tmp_path), config_of(source)
    assert saved.pop("quantization_config")
    assert saved == original


def test_names_of_fields_are_those_of_the_source():
    before = {"n_layer": 4, "text_config": {"vocab_size": 8, "x": 1}, "rope": {"theta": 1}}
    after = {"n_layer": 2, "text_config": {"vocab_size": 9, "x": 1}, "rope": {"theta": 1}, "new": 5}
    changes = changed_fields(before, after)
    assert changes == {"n_layer": 2, "text_config": {"vocab_size": 9}, "new": 5}
    stored = {"num_hidden_layers": 4, "text_config": {"vocab_size": 8}, "other": 3}
    assert with_changes(stored, changes, {"num_hidden_layers": "n_layer"}) == {
        "num_hidden_layers": 2,
        "text_config": {"vocab_size": 9},
        "other": 3,
        "new": 5,
    }


def test_two_modifiers_of_one_class_are_both_in_the_recipe(tmp_path):
    both = [modifier(["re:.*self_attn\\..*_proj$"], 8), modifier(["re:.*mlp\\..*_proj$"], 4)]
    quantize(tiny_llama(), both, output_dir=tmp_path)
    again = Recipe.create_instance(str(tmp_path / "recipe.yaml")).modifiers
    assert [one.resolved_targets for one in again] == [one.resolved_targets for one in both]
    assert [one.preset for one in again] == ["rtn", "rtn"]


def test_what_the_user_saves_later_is_finished_too(tmp_path):
    """With LLM-Compressor's own `oneshot`, in a session that another run has taken over."""
    model = tiny_llama()
    model.resize_token_embeddings(130)
    host_oneshot(model=model, recipe=modifier(["re:.*mlp\\..*_proj$"]))
    quantize(tiny_llama(num_layers=1), modifier())
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["vocab_size"] == 130
    (one,) = Recipe.create_instance(str(tmp_path / "recipe.yaml")).modifiers
    assert one.resolved_targets == {"re:.*mlp\\..*_proj$"}


def test_a_step_that_fails_leaves_the_checkpoint_and_raises(tmp_path, monkeypatch):
    def fail(saved):
        raise RuntimeError(f"cannot finish {saved.plan.stage}")

    monkeypatch.setattr(finishing, "FINISHING_STEPS", (fail,))
    with pytest.raises(RuntimeError, match="cannot finish default"):
        quantize(tiny_llama(num_layers=1), modifier(), output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_index_names_each_tensor_once(tmp_path):
    tiny_llama(num_layers=1).save_pretrained(tmp_path)
    before = set(tensor_files(tmp_path))
    save_file({"mtp.fc.weight": torch.ones(2)}, tmp_path / "more.safetensors")
    add_to_index(tmp_path, "more.safetensors", ["mtp.fc.weight"])
    add_to_index(tmp_path, "more.safetensors", ["mtp.fc.weight"])
    files = tensor_files(tmp_path)
    assert set(files) == before | {"mtp.fc.weight"}
    assert files["mtp.fc.weight"].name == "more.safetensors"


# ---------------------------------------------------------------------- before the run


def test_a_generation_config_is_judged_before_the_run(tmp_path, monkeypatch):
    model = tiny_llama()
    model.generation_config.max_new_tokens = 0
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SavingError, match="max_new_tokens"):
        quantize(model, modifier(preset="opt_rtn"), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_llama_2_chat_is_quantized_as_released(tmp_path):
    source = tmp_path / "chat"
    tiny_llama().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    (source / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    quantize(str(source), modifier(), output_dir=tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["do_sample"] is True
    assert (saved["temperature"], saved["top_p"]) == (0.9, 0.6)


def test_an_output_folder_inside_of_the_model_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(OutputExistsError, match="inside"):
        quantize(str(tmp_path), modifier(), output_dir=tmp_path / "w4")


@pytest.fixture
def in_hub_cache(tmp_path, monkeypatch):
    """:return: the folder of a model that was downloaded as ``some/model``"""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    tiny_llama(num_layers=1).save_pretrained(snapshot)
    references = snapshot.parent.parent / "refs"
    references.mkdir()
    (references / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_the_model_in_the_cache_of_the_hub_is_not_written_to(in_hub_cache):
    with pytest.raises(OutputExistsError, match="some--model"):
        oneshot("some/model", modifier(), output_dir=in_hub_cache, overwrite_output_dir=True)


def test_a_source_is_read_from_the_cache_of_the_hub(in_hub_cache):
    source = find_source("some/model")
    assert source.config == config_of(in_hub_cache)
    name, tensors = "model.norm.weight", saved_tensors(in_hub_cache)
    assert set(source.files) == set(tensors)
    assert torch.equal(source.tensor(name, torch.bfloat16), tensors[name])
    assert source.shape(name) == (64,)
    (in_hub_cache / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not on this machine"):
        source.tensor(name, torch.bfloat16)
    assert find_source("some/model") is None
    assert find_source("some/other") is None
    assert find_source("") is None


def test_what_a_killed_process_left_does_not_count(tmp_path):
    (tmp_path / ".unfinished-0123").mkdir()
    check_output_folder(tmp_path, False, [])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        check_output_folder(tmp_path, False, [])


# ---------------------------------------------------------------------- after the run


class Broken(AutoRoundModifier):
    """Quantizes so badly that one token is left."""

    def on_calibration_end(self, state, event, **kwargs):
        super().on_calibration_end(state, event, **kwargs)
        head = state.model.lm_head.weight
        head.data.zero_()


Broken.__name__ = "AutoRoundModifier"


@pytest.mark.parametrize(
    ("kind", "checked", "warned"),
    [(AutoRoundModifier, True, False), (Broken, True, True), (Broken, False, False)],
    ids=["usable", "broken", "not checked"],
)
def test_a_model_that_repeats_one_token_is_warned_of(kind, checked, warned, log):
    groups = {"group_0": scheme(8)}
    recipe = kind(preset="opt_rtn", ignore=["lm_head"], config_groups=groups)
    quantize(tiny_llama(), recipe, check_generation=checked)
    assert any("repeats one token (0)" in line for line in log) == warned


def test_a_check_that_cannot_be_made_is_not_made():
    model = tiny_llama()
    for batches in (None, [], iter([{"input_ids": torch.ones(1, 4)}])):
        GenerationCheck(model, batches).warn_if_repeating(model)
    loader = torch.utils.data.DataLoader(token_samples().with_format("torch"))
    check = GenerationCheck(model, loader)
    model.forward = lambda **kwargs: 1 / 0
    check.warn_if_repeating(model)
