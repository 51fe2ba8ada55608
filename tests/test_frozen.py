"""Parameters that are frozen where they are kept, also on the disk (`parameters_frozen`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import load_offloaded_model
from conftest import tiny_llama, token_samples
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedModel

import autoround_modifier
from autoround_modifier.blocks.reverse import ReversePass
from autoround_modifier.host.layers import disable_offloading, is_on_disk, parameters_frozen
from autoround_modifier.schemes import sensitivity


def on_disk(folder: Path) -> PreTrainedModel:
    with load_offloaded_model():
        model = AutoModelForCausalLM.from_pretrained(
            tiny_llama(num_layers=4).config._name_or_path,
            dtype=torch.bfloat16,
            device_map="auto_offload",
            max_memory={"cpu": 0},
            offload_folder=folder,
        )
    assert is_on_disk(model)
    return model


def in_memory(folder: Path) -> PreTrainedModel:
    return tiny_llama(num_layers=4)


PLACES = pytest.mark.parametrize("load", [on_disk, in_memory])


def trainable(model: PreTrainedModel) -> set[bool]:
    return {parameter.requires_grad for parameter in model.parameters()}


@PLACES
def test_frozen_for_a_while(load, tmp_path):
    model = load(tmp_path)
    assert trainable(model) == {True}
    with parameters_frozen([model]):
        assert trainable(model) == {False}
        with disable_offloading():
            assert trainable(model) == {False}
    assert trainable(model) == {True}


@PLACES
def test_frozen_while_copies_are_kept(load, tmp_path):
    """Copies that were there before, and copies that come while they are frozen."""
    model = load(tmp_path)
    early = model.model.layers[0].mlp
    with disable_offloading():
        assert trainable(early) == {True}
        copy = early.up_proj.weight
        with parameters_frozen([model]):
            assert early.up_proj.weight is copy
            assert trainable(model) == {False}
        assert early.up_proj.weight is copy
        assert trainable(model) == {True}
    assert trainable(model) == {True}


@PLACES
def test_what_was_frozen_stays_frozen_and_errors_undo_it_too(load, tmp_path):
    model = load(tmp_path)
    with parameters_frozen([model.lm_head]):
        with pytest.raises(RuntimeError, match="on the way"), parameters_frozen([model]):
            raise RuntimeError("on the way")
        assert trainable(model.lm_head) == {False}
        assert trainable(model.model) == {True}
    assert trainable(model) == {True}


@PLACES
def test_the_output_needs_no_gradient(load, tmp_path):
    model = load(tmp_path)
    with parameters_frozen([model]):
        logits = model(torch.arange(6).view(1, 6)).logits
    assert not logits.requires_grad


def saved_bytes(model: PreTrainedModel, monkeypatch) -> int:
    """:return: bytes that AutoScheme's forward pass saves for backward"""
    found = 0
    original: Callable = ReversePass.forward

    def counted(self, *args):
        def pack(tensor):
            nonlocal found
            found += tensor.nbytes
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            return original(self, *args)

    options = [
        {"name": f"W{bits}", "weights": {"num_bits": bits, "group_size": 32}} for bits in (2, 8)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(ReversePass, "forward", counted)
        autoround_modifier.choose_schemes(model, options, 6.0, token_samples(8), scale_search=False)
    return found


def test_auto_scheme_saves_no_more_of_a_model_on_the_disk(tmp_path, monkeypatch):
    """Only what lies behind the last block: the norm and the head."""
    memory = saved_bytes(in_memory(tmp_path), monkeypatch)
    disk = saved_bytes(on_disk(tmp_path / "frozen"), monkeypatch)
    assert 0 < memory == disk
    monkeypatch.setattr(sensitivity, "parameters_frozen", lambda modules: disable_offloading())
    not_frozen = saved_bytes(on_disk(tmp_path / "not frozen"), monkeypatch)
    assert not_frozen > 20 * disk
