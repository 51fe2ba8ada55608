"""`oneshot`: which folders it saves to, and where it takes a tokenizer from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import offload_module
from conftest import quantize, tiny_llama, tiny_llama_folder, tiny_tokenizer, weight_scheme
from transformers import LlamaForCausalLM

from autoround_modifier import (
    AutoRoundModifier,
    CalibrationError,
    OutputExistsError,
    entrypoint,
    oneshot,
)
from autoround_modifier.host.layers import weight_folders


def rtn() -> AutoRoundModifier:
    return AutoRoundModifier(preset="rtn", config_groups={"group_0": weight_scheme(4)})


@pytest.fixture
def started(monkeypatch) -> list[dict]:
    """The arguments of LLM-Compressor's `oneshot`, which does not run."""
    calls: list[dict] = []
    monkeypatch.setattr(entrypoint, "host_oneshot", lambda **kwargs: calls.append(kwargs))
    return calls


# ---------------------------------------------------------------------- output_dir


@pytest.fixture
def source(tmp_path) -> Path:
    """The folder of a model."""
    folder = tmp_path / "models" / "source"
    tiny_llama().save_pretrained(folder)
    return folder


def spellings(source: Path) -> dict[str, str]:
    link = source.parent.parent / "link"
    link.symlink_to(source)
    return {
        "the same": str(source),
        "relative": os.path.relpath(source),
        "roundabout": f"{source}/../source/.",
        "link": str(link),
        "parent": str(source.parent),
        "grandparent": str(source.parent.parent),
    }


@pytest.mark.parametrize("in_memory", [False, True], ids=["path", "model"])
def test_the_source_is_never_overwritten(in_memory, source, started):
    model = LlamaForCausalLM.from_pretrained(source) if in_memory else str(source)
    for spelling in spellings(source).values():
        with pytest.raises(OutputExistsError, match="holds the model that is quantized"):
            oneshot(model=model, recipe=rtn(), output_dir=spelling, overwrite_output_dir=True)
    assert not started


def test_the_source_given_by_a_link(source, started):
    link = spellings(source)["link"]
    with pytest.raises(OutputExistsError, match="holds the model that is quantized"):
        oneshot(model=link, recipe=rtn(), output_dir=source, overwrite_output_dir=True)
    assert not started


def test_files_of_an_offloaded_model_are_never_overwritten(tmp_path, started):
    """They are in a folder that no config names."""
    model = tiny_llama()
    (tmp_path / "offload").mkdir()
    layer = model.model.layers[0].mlp.up_proj
    offload_module(layer, "cpu", "disk", offload_dir=str(tmp_path / "offload"))
    assert weight_folders(model) == {tmp_path / "offload"}
    with pytest.raises(OutputExistsError, match="holds the model that is quantized"):
        oneshot(
            model=model, recipe=rtn(), output_dir=tmp_path / "offload", overwrite_output_dir=True
        )
    # the offload folder may hold links to the checkpoint
    (file,) = (tmp_path / "offload").iterdir()
    (tmp_path / "original").mkdir()
    file.replace(tmp_path / "original" / "model.safetensors")
    file.symlink_to(tmp_path / "original" / "model.safetensors")
    assert weight_folders(model) == {tmp_path / "original"}
    assert not started


def test_a_folder_beside_the_source_may_be_used(source, started):
    folder = source.parent / "source-w4"
    oneshot(model=str(source), recipe=rtn(), output_dir=folder, overwrite_output_dir=True)
    assert len(started) == 1
    assert not folder.exists()  # nothing is created beforehand


def test_a_folder_with_files_is_refused_unless_it_may_be_overwritten(tmp_path, source, started):
    (tmp_path / "out").mkdir()
    oneshot(model=str(source), recipe=rtn(), output_dir=tmp_path / "out")
    (tmp_path / "out" / "notes").write_text("")
    with pytest.raises(OutputExistsError, match="not empty"):
        oneshot(model=str(source), recipe=rtn(), output_dir=tmp_path / "out")
    oneshot(model=str(source), recipe=rtn(), output_dir=tmp_path / "out", overwrite_output_dir=True)
    assert len(started) == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_cannot_be_made_is_refused(overwrite, tmp_path, started, monkeypatch):
    (tmp_path / "file").write_text("")
    places = {
        tmp_path / "file": (OutputExistsError, "is a file"),
        tmp_path / "file" / "a" / "b": (NotADirectoryError, f"{tmp_path / 'file'} is a file"),
    }
    for place, (error, message) in places.items():
        with pytest.raises(error, match=message):
            oneshot(model="m", recipe=rtn(), output_dir=place, overwrite_output_dir=overwrite)
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path))
    with pytest.raises(PermissionError, match=f"{tmp_path} cannot be written to"):
        oneshot(
            model="m", recipe=rtn(), output_dir=tmp_path / "a" / "b", overwrite_output_dir=overwrite
        )
    assert asked == [tmp_path]
    assert not started


# ---------------------------------------------------------------------- tokenizers


@pytest.fixture
def loaded(monkeypatch) -> list[dict]:
    """The arguments by which tokenizers and processors were loaded."""
    calls: list[dict] = []

    class Loader:
        @staticmethod
        def from_pretrained(**kwargs):
            calls.append(kwargs)
            return tiny_tokenizer()

    monkeypatch.setattr(entrypoint, "AutoTokenizer", Loader)
    monkeypatch.setattr(entrypoint, "AutoProcessor", Loader)
    return calls


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 " * 50)
    return tmp_path / "text.txt"


def model_named(name: str):
    model = tiny_llama()
    model.config._name_or_path = name
    return model


FROM_TEXT = {"recipe": rtn(), "num_calibration_samples": 2, "max_seq_length": 8}


def test_the_hub_arguments_reach_the_tokenizer(text, started, loaded):
    oneshot(
        model="owner/model",
        dataset=str(text),
        model_revision="v2",
        trust_remote_code_model=True,
        **FROM_TEXT,
    )
    assert loaded == [
        {
            "pretrained_model_name_or_path": "owner/model",
            "revision": "v2",
            "trust_remote_code": True,
            "token": None,
            "local_files_only": False,
        }
    ]
    assert len(started[0]["dataset"]) == 2


def test_a_tokenizer_by_name_has_its_own_revisions(text, started, loaded):
    oneshot(
        model=tiny_llama(),
        dataset=str(text),
        tokenizer="owner/tokenizer",
        model_revision="v2",
        **FROM_TEXT,
    )
    assert loaded[0]["pretrained_model_name_or_path"] == "owner/tokenizer"
    assert "revision" not in loaded[0]
    assert loaded[0]["trust_remote_code"] is False


def test_token_and_local_files_reach_all_that_is_loaded_here(text, started, loaded):
    model = tiny_llama()
    oneshot(model=model, dataset=str(text), token="secret", local_files_only=True, **FROM_TEXT)
    assert len(loaded) == 1  # a processor, which LLM-Compressor need not load then
    assert loaded[0]["token"] == "secret"
    assert loaded[0]["local_files_only"] is True
    assert loaded[0]["pretrained_model_name_or_path"] == model.config._name_or_path
    assert started[0]["processor"] is not None
    assert "token" not in started[0]


@pytest.mark.parametrize("argument", [{"token": "secret"}, {"local_files_only": True}])
def test_what_the_host_would_ignore_is_refused(argument, started, loaded):
    with pytest.raises(ValueError, match="without `token` and `local_files_only`"):
        oneshot(model="owner/model", recipe=rtn(), **argument)
    folder = str(tiny_llama_folder(torch.bfloat16, 2, 0, False))
    oneshot(model=folder, recipe=rtn(), **argument)  # on this machine anyway
    assert len(started) == 1


@pytest.mark.parametrize("name", ["stranger/tokenizer", "", "/no/such/folder/at/all"])
def test_a_name_in_the_config_alone_is_not_fetched(name, text, started, loaded):
    with pytest.raises(CalibrationError, match="Pass `tokenizer=`"):
        oneshot(model=model_named(name), dataset=str(text), **FROM_TEXT)
    assert not loaded
    assert not started


def test_a_model_from_the_hub_brings_its_tokenizer(text, started, loaded, monkeypatch):
    asked = []

    def cached(name, file, revision):
        asked.append((name, file, revision))
        return "/cache/config.json"

    monkeypatch.setattr(entrypoint, "try_to_load_from_cache", cached)
    model = model_named("owner/model")
    model.config._commit_hash = "abc"
    oneshot(model=model, dataset=str(text), **FROM_TEXT)
    assert asked == [("owner/model", "config.json", "abc")]
    assert loaded[0]["pretrained_model_name_or_path"] == "owner/model"
    assert loaded[0]["revision"] == "abc"


def test_a_model_from_a_folder_brings_its_tokenizer(text):
    """Nothing is replaced here: the tokenizer is saved beside the model."""
    model = quantize(tiny_llama(), rtn(), str(text), num_calibration_samples=2, max_seq_length=8)
    assert model.lm_head is not None
    recipe = AutoRoundModifier(
        preset="light", iters=1, batch_size=2, config_groups={"group_0": weight_scheme(4)}
    )
    oneshot(
        model=tiny_llama(),
        recipe=recipe,
        dataset=str(text),
        num_calibration_samples=4,
        max_seq_length=8,
        local_files_only=True,
    )
    assert len(recipe.block_reports) == 2
