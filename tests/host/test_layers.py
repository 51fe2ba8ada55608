"""host/layers.py: parameters that compressed-tensors keeps on the CPU or on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import load_offloaded_model, offload_module
from compressed_tensors.offload.cache import DiskCache, OffloadCache
from conftest import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from autoround_modifier.host import layers


def offloaded(place: str, folder: Path) -> nn.Linear:
    """:return: a layer whose weight, all ones, is kept on the disk or in the CPU's memory"""
    layer = nn.Linear(4, 3, bias=False)
    nn.init.ones_(layer.weight)
    options = {"offload_dir": str(folder)} if place == "disk" else {}
    offload_module(layer, torch.device("cpu"), place, **options)
    return layer


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_stored_and_brought_weights(place, tmp_path):
    layer = offloaded(place, tmp_path)
    assert isinstance(layer._parameters, OffloadCache)
    assert isinstance(layer._parameters, DiskCache) == (place == "disk")
    assert layers.is_on_disk(nn.Sequential(nn.Identity(), layer)) == (place == "disk")
    assert layers.get_execution_device(layer) == torch.device("cpu")
    stored = layers.stored_weight(layer)
    assert stored is layers.stored_weight(layer)
    assert (stored.shape, stored.dtype) == ((3, 4), torch.float32)
    assert stored.device.type == ("meta" if place == "disk" else "cpu")
    assert layer.weight.device.type == "cpu"
    assert layer.weight.sum() == 12
    assert (layer.weight is layer.weight) == (place == "cpu")  # here both are the same device


def test_a_layer_that_is_not_offloaded():
    layer = nn.Linear(4, 3)
    assert layers.stored_weight(layer) is layer.weight
    assert not layers.is_on_disk(layer)
    layers.write_parameter(layer, "weight", torch.full((3, 4), 2.0))
    assert layer.weight.requires_grad
    assert layer.weight.sum() == 24


def test_copies_are_kept_while_offloading_is_disabled(tmp_path):
    layer = offloaded("disk", tmp_path)
    stored = layers.stored_weight(layer)
    with layers.disable_offloading():
        copy = layer.weight
        assert layer.weight is copy
        assert OffloadCache.keep_onloaded_values.get(stored) is copy
        with layers.disable_onloading():
            assert layer.weight is stored
    assert OffloadCache.keep_onloaded_values == {}
    assert layer.weight is not copy


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_writing_reaches_what_is_stored_and_what_was_brought(place, tmp_path):
    layer = offloaded(place, tmp_path)
    with layers.disable_offloading():
        copy = layer.weight
        layers.write_parameter(layer, "weight", torch.full((3, 4), 2.0))
        assert copy.sum() == 24
    assert layer.weight.sum() == 24
    layer.register_buffer("mean", torch.zeros(2))
    layers.write_parameter(layer, "mean", torch.ones(2))
    assert layer.mean.tolist() == [1, 1]


def test_a_model_loaded_to_the_disk_is_known(tmp_path):
    folder = Path(tiny_llama().config._name_or_path)
    with load_offloaded_model():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map="auto_offload",
            max_memory={"cpu": 0},
            offload_folder=tmp_path,
        )
    assert layers.is_on_disk(model)
    # links, until a weight is written
    assert layers.weight_folders(model) == {folder.resolve()}
    layer = model.lm_head
    layers.write_parameter(layer, "weight", torch.ones_like(layer.weight))
    assert layers.weight_folders(model) == {folder.resolve(), tmp_path.resolve()}
    assert layers.weight_folders(tiny_llama()) == set()
    assert not layers.is_on_disk(tiny_llama())
    with layers.disable_onloading():
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_parameters_brought_from_the_disk_take_after_what_is_stored(tmp_path):
    layer = offloaded("disk", tmp_path)
    for trainable in (True, False):
        layers.stored_weight(layer).requires_grad_(trainable)
        assert layer.weight.requires_grad == trainable
