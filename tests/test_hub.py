"""Names are resolved and checkpoints uploaded by the real clients, without a network."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from conftest import quantize, tiny_llama, weight_scheme
from hub_server import NAME, Hub, running
from transformers import AutoModelForCausalLM

from autoround_modifier import AutoRoundModifier
from autoround_modifier.cli.main import main
from autoround_modifier.errors import HubError, MissingExtraError
from autoround_modifier.hub import chosen_platform, resolve_model
from autoround_modifier.hub.platform import MODELSCOPE_VARIABLES


@pytest.fixture(autouse=True)
def _no_platform(monkeypatch):
    for variable in MODELSCOPE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A quantized checkpoint, with a card and a file that a killed process left."""
    folder = tmp_path_factory.mktemp("saved") / "tiny-w4"
    recipe = AutoRoundModifier(
        preset="rtn", config_groups={"group_0": weight_scheme(4)}, ignore=["lm_head"]
    )
    quantize(tiny_llama(), recipe, output_dir=str(folder))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / ".unfinished-0123").write_text("half")
    (folder / "original").mkdir()
    (folder / "original" / ".unfinished-4567").write_text("half")
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    """ModelScope's client keeps the endpoint and the cache of its first request."""
    folder = tmp_path_factory.mktemp("modelscope")
    with running() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        patch.setenv("MODELSCOPE_HOME", str(folder / "home"))
        patch.setenv("MODELSCOPE_CACHE", str(folder / "cache"))
        yield hub


@pytest.fixture
def online(hub, monkeypatch, tmp_path) -> Hub:
    """A hub that both clients reach, with a model on ModelScope."""
    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    for name in ("pytorch_model.bin", "model.gguf"):
        (source / name).write_bytes(b"another format")
    hub.forget(source)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    shutil.rmtree(os.environ["MODELSCOPE_CACHE"], ignore_errors=True)
    return hub


@pytest.mark.parametrize(
    ("environment", "name", "expected"),
    [
        ({}, None, "huggingface"),
        ({}, "hf", "huggingface"),
        ({}, "model_scope", "modelscope"),
        ({"AUTOROUND_USE_MODELSCOPE": "1"}, None, "modelscope"),
        ({"AR_USE_MODELSCOPE": "1"}, None, "modelscope"),
        ({"VLLM_USE_MODELSCOPE": "True"}, None, "modelscope"),
        ({"VLLM_USE_MODELSCOPE": "False"}, None, "huggingface"),
        ({"AUTOROUND_USE_MODELSCOPE": "0", "VLLM_USE_MODELSCOPE": "1"}, None, "huggingface"),
        ({"AUTOROUND_USE_MODELSCOPE": "1"}, "huggingface", "huggingface"),
    ],
)
def test_platform(monkeypatch, environment, name, expected):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert chosen_platform(name) == expected


def test_unknown_platform():
    with pytest.raises(HubError, match="unknown platform `github`; use one of huggingface, hf"):
        chosen_platform("github")


def test_folders_and_names_of_hugging_face_stay_as_they_are(tmp_path):
    assert resolve_model(tmp_path, "modelscope") == str(tmp_path)
    assert resolve_model("someone/tiny") == "someone/tiny"


def test_download_from_modelscope(online, monkeypatch):
    folder = Path(resolve_model(NAME, "modelscope"))
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert not {"pytorch_model.bin", "model.gguf"} & names
    AutoModelForCausalLM.from_pretrained(folder)
    asked = len(online.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(NAME, "modelscope") == str(folder)
    assert len(online.requests) == asked


def test_pickled_weights_where_there_are_no_others(online):
    (online.model / "model.safetensors").unlink()
    names = {path.name for path in Path(resolve_model(NAME, "modelscope")).iterdir()}
    assert "pytorch_model.bin" in names
    assert "model.gguf" not in names


def test_not_on_modelscope(online, monkeypatch):
    with pytest.raises(HubError, match="no folder `someone/other`, and it was not found on Model"):
        resolve_model("someone/other", "modelscope")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not found in ModelScope's cache, and HF_HUB_OFFLINE"):
        resolve_model("someone/other", "modelscope")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'autoround-modifier\[modelscope\]'"):
        resolve_model("someone/tiny", "modelscope")


@pytest.mark.parametrize("platform", ["huggingface", "modelscope"])
def test_push(online, saved, capsys, platform):
    arguments = ["--platform", platform, "--private", "--token", "secret", "--json"]
    assert main(["push", str(saved), NAME, "--message", "First release", *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["platform"] == platform
    assert printed["repository"] == NAME
    assert NAME in printed["url"]
    there = {
        str(path.relative_to(saved)): path.read_bytes()
        for path in saved.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    uploaded = {name: data for name, data in online.uploaded.items() if name != ".gitattributes"}
    assert uploaded == there
    assert not (saved / ".ms_upload_cache").exists()
    assert "Bearer secret" in online.tokens
    if platform == "huggingface":
        assert online.bodies["/api/repos/create"]["visibility"] == "private"
        assert online.bodies[f"/api/models/{NAME}/commit/main"]["summary"] == "First release"
    else:
        created = online.bodies["/api/v1/models"]
        assert (created["Visibility"], created["License"]) == (1, "mit")


def test_push_to_a_branch(online, saved):
    assert main(["push", str(saved), NAME, "--revision", "w4"]) == 0
    assert f"POST /api/models/{NAME}/branch/w4" in online.requests
    assert f"POST /api/models/{NAME}/commit/w4" in online.requests


def test_checkpoint_that_does_not_load(online, saved, tmp_path, capsys):
    broken = shutil.copytree(saved, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Conv2d"]
    (broken / "config.json").write_text(json.dumps(config))
    assert main(["push", str(broken), NAME]) == 1
    assert "does not load" in capsys.readouterr().err
    assert not online.requests
    assert main(["push", str(broken), NAME, "--force"]) == 0
    assert "config.json" in online.uploaded


def test_refused_before_anything_is_sent(online, saved, tmp_path, monkeypatch, capsys):
    assert main(["push", str(tmp_path / "nowhere"), NAME]) == 1
    assert main(["push", str(saved), "tiny"]) == 1
    assert "`tiny` is no name of a repository; give OWNER/NAME" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(saved), NAME]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not online.requests


def test_missing_card(online, saved, tmp_path, capsys):
    plain = shutil.copytree(saved, tmp_path / "plain")
    (plain / "README.md").unlink()
    assert main(["push", str(plain), NAME]) == 0
    assert "has no model card; `autoround-modifier card" in capsys.readouterr().err
