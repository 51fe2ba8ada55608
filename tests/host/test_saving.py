"""LLM-Compressor's `save_pretrained`, what runs after it, and what a failure leaves."""

from __future__ import annotations

import json

import pytest
from conftest import tiny_llama
from llmcompressor.core import active_session, reset_session
from llmcompressor.recipe import Recipe

from autoround_modifier.host.saving import UNFINISHED_PREFIX, finish_when_saved


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
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = False
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "new" / "out")
    assert names(tmp_path) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="temperature"):
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


def test_uploading_while_saving_is_refused(model, tmp_path):
    finish_when_saved(model, lambda *_: None)
    with pytest.raises(ValueError, match="upload_folder"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()
