"""Quantized weights after a run, from the model in memory and from the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import quantize, tiny_llama, weight_scheme
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from autoround_modifier import (
    AutoRoundModifier,
    CheckpointError,
    QuantizedWeight,
    RecipeError,
    quantized_weights,
)
from autoround_modifier.host.schemes import QuantizationStatus, preset_name_to_scheme

UP = "model.layers.0.mlp.up_proj"


def preset(name: str) -> dict:
    return preset_name_to_scheme(name, ["Linear"]).model_dump(exclude_none=True)


def floats(**weights) -> dict:
    return {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", **weights}}


def with_tokens(scheme: dict, **options) -> dict:
    """:return: the same with INT8 activations of each token"""
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    return {**scheme, "input_activations": inputs, **options}


FORMATS = {
    "W2": [weight_scheme(2)],
    "W2 asymmetric": [weight_scheme(2, False)],
    "W3": [weight_scheme(3)],
    "W4": [weight_scheme(4)],
    "W4 asymmetric": [weight_scheme(4, False)],
    "W4 asymmetric channel": [weight_scheme(4, False, None)],
    "W8 channel": [weight_scheme(8, True, None)],
    "W8 asymmetric": [weight_scheme(8, False)],
    "W8A8": [with_tokens(weight_scheme(8, True, None))],
    "W4A8, one to a byte": [with_tokens(weight_scheme(4))],
    "W4A8, packed": [with_tokens(weight_scheme(4), format="pack-quantized")],
    "FP8 channel": [floats(strategy="channel")],
    "FP8 tensor": [floats(strategy="tensor")],
    "FP8 block": [floats(strategy="block", block_structure=[48, 48])],
    "MXFP4": [preset("MXFP4A16")],
    "MXFP8": [preset("MXFP8A16")],
    "NVFP4": [preset("NVFP4A16")],
    "embedding and head": [weight_scheme(4, targets=("Linear", "Embedding"))],
    "another embedding": [
        weight_scheme(2, False, 64),
        weight_scheme(8, targets=("Embedding",)),
    ],
    "mixed": [
        weight_scheme(4, targets=("re:.*down_proj$",)),
        {**preset("NVFP4A16"), "targets": [UP]},
        {**floats(strategy="channel"), "targets": ["re:.*o_proj$"]},
        weight_scheme(2, False),
    ],
}


def run(groups: list[dict], tied: bool = False) -> PreTrainedModel:
    """:return: a tiny model with two blocks, quantized in memory"""
    model = tiny_llama(tied=tied)
    embedding = any("Embedding" in group["targets"] for group in groups)
    recipe = AutoRoundModifier(
        preset="light",
        iters=2,
        batch_size=8,
        ignore=[] if embedding else ["lm_head"],
        engine="none",  # some of these are read by none
        config_groups={f"group_{index}": group for index, group in enumerate(groups)},
    )
    return quantize(model, recipe)


def assert_same(found: Mapping[str, QuantizedWeight], expected: Mapping[str, QuantizedWeight]):
    assert set(found) == set(expected)
    assert len(found) == len(expected)
    for name, weight in expected.items():
        other = found[name]
        assert other.parts.keys() == weight.parts.keys(), name
        for part, tensor in weight.parts.items():
            assert other.parts[part].dtype == tensor.dtype, (name, part)
            assert other.parts[part].shape == tensor.shape, (name, part)
            # values, not bits: a negative zero of E2M1 may have lost its sign
            assert torch.equal(other.parts[part].float(), tensor.float()), (name, part)
        assert other.grid == weight.grid
        assert other.grouping == weight.grouping
        assert torch.equal(other.dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_in_memory_and_in_the_checkpoint(name, written, tmp_path):
    model = run(FORMATS[name])
    names = {module: name for name, module in model.named_modules()}
    expected = {names[module]: weight for module, (weight, _) in written.items()}
    assert UP in expected
    assert ("lm_head" in expected) == ("embed" in name)
    assert_same(quantized_weights(model), expected)
    model.save_pretrained(tmp_path)  # compresses the model in memory
    assert model.get_submodule(UP).quantization_status == QuantizationStatus.COMPRESSED
    assert_same(quantized_weights(model), expected)
    assert_same(quantized_weights(tmp_path), expected)
    with torch.no_grad():
        model(torch.arange(4).view(1, 4))  # decompresses it
    assert model.get_submodule(UP).quantization_status == QuantizationStatus.DECOMPRESSED
    found = quantized_weights(model)
    if name != "W8 asymmetric":
        assert_same(found, expected)
    for layer, weight in expected.items():  # bfloat16 has 8 significant bits
        assert torch.equal(found[layer].dequantize(), weight.dequantize())
        assert (found[layer].values.float() - weight.values.float()).abs().max() <= 1


@pytest.mark.parametrize("name", ["W4 asymmetric", "MXFP4", "NVFP4"])
def test_a_checkpoint_that_was_loaded(name, tmp_path):
    run(FORMATS[name]).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(quantized_weights(loaded), dict(quantized_weights(tmp_path)))


def test_tensors_are_those_of_the_caller():
    model = run(FORMATS["W4"])
    weight = quantized_weights(model)[UP]
    before = weight.dequantize()
    for tensor in model.get_submodule(UP).parameters():
        tensor.data.zero_()
    assert torch.equal(weight.dequantize(), before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(FORMATS["W4"]).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    """A copy of a W4 checkpoint, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def change_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_sharded_checkpoint(checkpoint, tmp_path):
    whole = quantized_weights(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for index, (name, tensor) in enumerate(tensors.items()):
        shards[("a.safetensors", "b.safetensors")[index % 2]][name] = tensor
    for file, shard in shards.items():
        save_file(shard, checkpoint / file)
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    index_file = checkpoint / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    whole = dict(whole)
    (checkpoint / "model.safetensors").unlink()
    # files that the index does not name are none of the checkpoint's
    save_file({f"{UP}.weight_scale": torch.ones(1)}, checkpoint / "other.safetensors")
    assert_same(quantized_weights(checkpoint), whole)
    assert set(quantized_weights(str(checkpoint))) == set(whole)
    (checkpoint / "b.safetensors").unlink()
    found = quantized_weights(checkpoint)
    with pytest.raises(CheckpointError, match=r"b\.safetensors cannot be read"):
        dict(found)


def test_a_mapping(checkpoint):
    found = quantized_weights(checkpoint)
    assert UP in found
    assert len(found) == 14
    assert "lm_head" not in found
    with pytest.raises(KeyError):
        found["lm_head"]


def test_float16_scales_of_a_bfloat16_model(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].half()
    save_file(tensors, path)
    weight = quantized_weights(checkpoint)[UP]
    assert weight.scale.dtype == weight.grid.scale_dtype == torch.float16
    assert weight.dequantize().dtype == weight.grid.dtype == torch.bfloat16


def test_a_model_that_is_not_quantized():
    with pytest.raises(RecipeError, match="no quantized linear layer"):
        quantized_weights(tiny_llama())
    with pytest.raises(RecipeError, match="no quantized linear layer"):
        quantized_weights(nn.Linear(2, 2))


def of_gptq(config: dict) -> None:
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}


def without_groups(config: dict) -> None:
    config["quantization_config"]["config_groups"] = "Linear"


def of_no_dtype(config: dict) -> None:
    config["dtype"] = "float99"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("quantization_config"), "no `quantization_config`"),
        (of_gptq, "no `quantization_config` of compressed-tensors"),
        (without_groups, "`config_groups` of `quantization_config` is no JSON object"),
        (of_no_dtype, "float99, which is no dtype"),
    ],
)
def test_configs_that_are_refused(change, message, checkpoint):
    change_config(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        quantized_weights(checkpoint)


def test_folders_that_are_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        quantized_weights(tmp_path / "nothing")
    (checkpoint / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        quantized_weights(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weight of this checkpoint is quantized"):
        quantized_weights(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        quantized_weights(checkpoint)


def test_a_layer_that_its_config_does_not_describe(checkpoint):
    def eight_bits(config: dict) -> None:
        (group,) = config["quantization_config"]["config_groups"].values()
        group["weights"]["num_bits"] = 8

    change_config(checkpoint, eight_bits)
    with pytest.raises(CheckpointError, match=rf"{UP} is quantized, and no config group.*Linear"):
        quantized_weights(checkpoint)[UP]
