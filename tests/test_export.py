"""Exported checkpoints hold the tuner's integers, scales and zero points, or are refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import export_readers
import pytest
import torch
from export_sources import Tuned, config_of, spec, tuned
from helpers import saved_tensors
from safetensors.torch import load_file, save_file

from autoround_modifier import (
    CheckpointError,
    ExportError,
    OutputExistsError,
    export,
    quantized_weights,
)
from autoround_modifier.exports import written_files
from autoround_modifier.exports.auto_round_format import auto_round_config
from autoround_modifier.exports.export_formats import FORMATS, check_format
from autoround_modifier.exports.gptq import gptq_config

BITS = (2, 3, 4, 8)
FOLDERS = ("gptq", "awq", "auto_round", "mlx")
DOWN, Q = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"


def section_of(folder: Path) -> dict:
    return config_of(folder)["quantization_config"]


def assert_same(source: Tuned, folder: Path) -> None:
    tensors = saved_tensors(folder)
    saved = quantized_weights(source.folder)
    assert set(saved) == set(source.layers)
    for name, (bits, expected) in source.layers.items():
        found = export_readers.read(folder, tensors, name, bits)
        assert torch.equal(found.codes, expected.codes), name
        assert torch.equal(found.scale.double(), expected.scale.double()), name
        assert torch.equal(found.zero_point.double(), expected.zero_point.double()), name
        of_checkpoint = saved[name]
        repeats = found.codes.shape[1] // found.scale.shape[1]
        steps = of_checkpoint.values.double() - of_checkpoint.zero_point.double().repeat_interleave(
            repeats, 1
        )
        weight = of_checkpoint.scale.double().repeat_interleave(repeats, 1) * steps
        assert torch.equal(found.dequantize(), weight), name


def assert_others_are_kept(source: Path, folder: Path) -> None:
    before, after = saved_tensors(source), saved_tensors(folder)
    layers = {name.rpartition(".")[0] for name in before if name.endswith(".weight_packed")}
    kept = {name for name in before if name.rpartition(".")[0] not in layers}
    assert kept == {name for name in after if name.rpartition(".")[0] not in layers}
    assert kept
    for name in kept:
        assert torch.equal(before[name], after[name])
        assert before[name].dtype == after[name].dtype


MATRIX = [
    (format, bits, symmetric, size)
    for bits, symmetric, size, format in itertools.product(BITS, (True, False), (32, None), FOLDERS)
    if (format != "awq" or bits == 4) and (format != "mlx" or size is not None)
]


@pytest.mark.parametrize(("format", "bits", "symmetric", "size"), MATRIX)
def test_integers_scales_and_zero_points_are_the_tuners(format, bits, symmetric, size, tmp_path):
    source = tuned((bits, symmetric, size))
    exported = export(source.folder, format, tmp_path / "out")
    assert (exported.format, exported.layers) == (format, 7)
    assert_same(source, tmp_path / "out")
    assert_others_are_kept(source.folder, tmp_path / "out")
    section = section_of(tmp_path / "out")
    assert (section["bits"], section["group_size"]) == (bits, -1 if size is None else size)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert names.isdisjoint({"quantization_report.json", "model.safetensors.index.json"})
    before = config_of(source.folder)
    if format == "mlx":
        before["rope_theta"] = before["rope_parameters"]["rope_theta"]
    after = config_of(tmp_path / "out")
    added = {"quantization_config", "quantization"}
    assert {k: v for k, v in after.items() if k not in added} == {
        k: v for k, v in before.items() if k not in added
    }


@pytest.mark.parametrize(("symmetric", "version"), [(True, "gptq"), (False, "gptq_v2")])
def test_gptq_config(symmetric, version, tmp_path):
    export(tuned((4, symmetric, 32)).folder, "gptq", tmp_path)
    section = section_of(tmp_path)
    assert section == json.loads((tmp_path / "quantize_config.json").read_text())
    assert section.pop("meta")["quantizer"][0].startswith("autoround_modifier:")
    assert section == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": version,
        "pack_dtype": "int32",
    }
    tensors = saved_tensors(tmp_path)
    assert tensors[f"{DOWN}.g_idx"].dtype == torch.int32
    assert tensors[f"{DOWN}.g_idx"].tolist() == [i // 32 for i in range(128)]


@pytest.mark.parametrize("format", ["gptq", "auto_round"])
def test_zero_points_of_zero(format, tmp_path):
    """The first version of GPTQ's format stores them less one, so it has no number for 0."""
    source = tuned((2, False, 32))
    folder = changed(source.folder, tmp_path / "source", with_zero_points_of_zero)
    export(folder, format, tmp_path / "out")
    found = export_readers.read(tmp_path / "out", saved_tensors(tmp_path / "out"), DOWN, 2)
    assert not found.zero_point.any()
    assert torch.equal(found.codes, source.layers[DOWN][1].codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_config(symmetric, tmp_path):
    export(tuned((4, symmetric, 32)).folder, "awq", tmp_path)
    assert section_of(tmp_path) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


@pytest.mark.parametrize(
    ("bits", "symmetric", "packing"),
    [
        (2, True, "auto_round:auto_gptq"),
        (4, True, "auto_round:auto_gptq"),
        (4, False, "auto_round:auto_awq"),
        (2, False, "auto_round"),
        (8, False, "auto_round"),
    ],
)
def test_auto_round_config(bits, symmetric, packing, tmp_path):
    export(tuned((bits, symmetric, 32)).folder, "auto_round", tmp_path)
    section = section_of(tmp_path)
    assert section.pop("quantizer").startswith("autoround_modifier:")
    assert section == {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": bits,
        "group_size": 32,
        "sym": symmetric,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
    }
    assert f"{DOWN}.g_idx" not in saved_tensors(tmp_path)


def test_mlx_config_and_dtypes(tmp_path):
    export(tuned((4, True, 32)).folder, "mlx", tmp_path / "symmetric")
    config = config_of(tmp_path / "symmetric")
    expected = {"bits": 4, "group_size": 32, "mode": "affine"}
    assert config["quantization"] == config["quantization_config"] == expected
    tensors = saved_tensors(tmp_path / "symmetric")
    assert tensors[f"{DOWN}.biases"].dtype == tensors[f"{DOWN}.scales"].dtype == torch.bfloat16
    exported = export(tuned((4, False, 32)).folder, "mlx", tmp_path / "asymmetric")
    assert saved_tensors(tmp_path / "asymmetric")[f"{DOWN}.biases"].dtype == torch.float32
    assert "float32" in exported.notes[0]


ATTENTION, MLP = (r"re:.*self_attn\..*_proj",), (r"re:.*mlp\..*_proj",)


def mixed() -> Tuned:
    return tuned((2, True, 32, MLP), (4, False, None, ATTENTION), layers=2)


@pytest.mark.parametrize("format", ["gptq", "auto_round"])
def test_mixed_bits(format, tmp_path):
    exported = export(mixed().folder, format, tmp_path)
    assert_same(mixed(), tmp_path)
    section = section_of(tmp_path)
    assert (section["bits"], section["group_size"], section["sym"]) == (4, -1, False)
    names = [name for name in mixed().layers if ".mlp." in name]
    if format == "auto_round":
        entry = {"bits": 2, "group_size": 32, "sym": False, "data_type": "int"}
        assert section["extra_config"] == dict.fromkeys(names, entry)
        return
    ((key, value),) = section["dynamic"].items()
    assert value == {"bits": 2, "group_size": 32}
    expression = key.removeprefix("+:")
    fused = "model.layers.1.mlp.gate_up_proj"
    for match in (re.match, re.search, re.fullmatch):
        assert all(match(expression, name) for name in [*names, fused])
        assert not any(
            match(expression, name)
            for name in [Q, "model.layers.2.mlp.up_proj", "model.layers.1.mlp.up_proj.x"]
        )
    assert "Transformers does not" in exported.notes[0]


def test_mixed_bits_in_mlx(tmp_path):
    source = tuned((2, True, 32, MLP), (4, True, 32, ATTENTION))
    export(source.folder, "mlx", tmp_path)
    assert_same(source, tmp_path)
    quantization = config_of(tmp_path)["quantization"]
    assert (quantization.pop("bits"), quantization.pop("mode")) == (4, "affine")
    assert quantization.pop("group_size") == 32
    entry = {"bits": 2, "group_size": 32, "mode": "affine"}
    assert quantization == {name: entry for name in source.layers if ".mlp." in name}


def test_mixed_group_sizes_are_refused_by_awq(tmp_path):
    source = tuned((4, True, 32, MLP), (4, True, None, ATTENTION))
    with pytest.raises(ExportError, match="exported to gptq, auto_round") as refused:
        export(source.folder, "awq", tmp_path / "out")
    assert "other group sizes" in str(refused.value)
    assert DOWN in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FOLDERS)
def test_layers_that_are_not_quantized(format, tmp_path):
    source = tuned((4, True, 32, ("re:.*(q|k|v)_proj",)), layers=2)
    export(source.folder, format, tmp_path)
    assert_same(source, tmp_path)
    section = section_of(tmp_path)
    skipped = [
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj")
    ]
    fused = ["model.layers.0.mlp.gate_up_proj", "model.layers.1.mlp.gate_up_proj"]
    if format == "gptq":
        (inside,) = section["modules_in_block_to_quantize"]
        assert set(inside) == {f"self_attn.{x}_proj" for x in "qkv"}
        ((key, value),) = section["dynamic"].items()
        assert value == {}
        assert all(re.match(key.removeprefix("-:"), name) for name in [*skipped, *fused])
        assert not re.match(key.removeprefix("-:"), Q)
    if format == "awq":
        assert set(section["modules_to_not_convert"]) == {"lm_head", *skipped, *fused}
    if format == "auto_round":
        entry = {"bits": 16, "data_type": "float"}
        assert section["extra_config"] == dict.fromkeys(skipped, entry)


@pytest.mark.parametrize(
    "targets",
    [("re:.*layers.1.mlp.*_proj", "re:.*self_attn.*_proj"), ("re:.*layers.1.*_proj",)],
    ids=["a layer", "a block"],
)
def test_blocks_that_differ_are_left_to_dynamic(targets, tmp_path):
    source = tuned((4, True, 32, targets), layers=2)
    exported = export(source.folder, "gptq", tmp_path)
    assert "modules_in_block_to_quantize" not in section_of(tmp_path)
    assert "GPTQModel and vLLM read that, Transformers does not" in exported.notes[0]


def test_tied_embeddings(tmp_path):
    source = tuned((4, True, 32), tied=True)
    export(source.folder, "gptq", tmp_path)
    assert config_of(tmp_path)["tie_word_embeddings"]
    assert "lm_head.weight" not in saved_tensors(tmp_path)
    assert_others_are_kept(source.folder, tmp_path)


def changed(source: Path, folder: Path, change) -> Path:
    """:return: a copy of a checkpoint, whose tensors and config ``change`` has changed"""
    shutil.copytree(source, folder)
    tensors, config = load_file(folder / "model.safetensors"), config_of(folder)
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("format", FOLDERS)
def test_a_sharded_checkpoint_whose_layers_are_split_over_files(format, tmp_path):
    source = tuned((4, False, 32))
    folder = tmp_path / "source"
    shutil.copytree(source.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        part = {x: tensors[x] for x in tensors if x.endswith("weight_packed") == (number == 1)}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    exported = export(folder, format, tmp_path / "out")
    assert_same(source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == exported.bytes
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert set(index["weight_map"]) == set(saved_tensors(tmp_path / "out"))


def test_integers_that_are_one_to_a_byte(tmp_path):
    """Weights alone, in the format `int-quantized`."""
    source = tuned((8, True, None))

    def change(tensors, config):
        for name, (_, integers) in source.layers.items():
            del tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_shape"]
            tensors[f"{name}.weight"] = (integers.codes - 128).to(torch.int8)
        quantization = config["quantization_config"]
        quantization["format"] = "int-quantized"
        for group in quantization["config_groups"].values():
            group["format"] = "int-quantized"

    folder = changed(source.folder, tmp_path / "source", change)
    export(folder, "gptq", tmp_path / "out")
    assert_same(source, tmp_path / "out")


def with_activations(tensors, config):
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = inputs


def with_cache(tensors, config):
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)


def with_order(tensors, config):
    tensors[f"{DOWN}.weight_g_idx"] = torch.zeros(128, dtype=torch.int32)


def with_zero_points_of_zero(tensors, config):
    tensors[f"{DOWN}.weight_zero_point"].zero_()


def with_experts(tensors, config):
    for name in [name for name in tensors if name.startswith(f"{DOWN}.")]:
        tensors[name.replace("mlp", "mlp.experts.3")] = tensors.pop(name)


def with_wide_scales(tensors, config):
    tensors[f"{DOWN}.weight_scale"][0, 0] = 70000.0


def with_subnormal_scales(tensors, config):
    """Of bfloat16, with digits that float16 loses."""
    tensors[f"{DOWN}.weight_scale"][0, 0] = 4.5e-6


def with_a_zero_group(tensors, config):
    """As the tuner leaves a group whose weights are all zero."""
    tensors[f"{DOWN}.weight_packed"][0, :4] = -0x77777778  # 32 codes of 8
    tensors[f"{DOWN}.weight_scale"][0, 0] = torch.finfo(torch.bfloat16).tiny


def with_transforms(tensors, config):
    config["quantization_config"]["transform_config"] = {"config_groups": {}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_activations, "quantizes activations: .*down_proj"),
        (with_cache, "key-value cache is quantized: .*k_scale"),
        (with_order, "actorder.*down_proj"),
        (with_experts, "experts of a mixture .*experts.3.down_proj"),
        (with_wide_scales, "exported to mlx.*not exact in float16: .*down_proj"),
        (with_subnormal_scales, "exported to mlx.*not exact in float16: .*down_proj"),
        (with_transforms, "rotated while the model runs"),
    ],
)
def test_refused_checkpoints(change, said, tmp_path):
    folder = changed(tuned((4, True, 32)).folder, tmp_path / "source", change)
    with pytest.raises(ExportError, match=f"(?s){said}"):
        export(folder, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["gptq", "awq", "auto_round"])
def test_a_group_of_zeros_has_any_scale(format, tmp_path):
    folder = changed(tuned((4, True, 32)).folder, tmp_path / "source", with_a_zero_group)
    export(folder, format, tmp_path / "out")
    found = export_readers.read(tmp_path / "out", saved_tensors(tmp_path / "out"), DOWN, 4)
    assert found.scale[0, 0] == 0
    weight = quantized_weights(folder)[DOWN]
    assert not weight.values[0, :32].any()
    expected = weight.scale.double().repeat_interleave(32, 1) * weight.values.double()
    assert torch.equal(found.dequantize(), expected)


def test_one_layer_with_zero_points_among_others(tmp_path):
    """All are then stored as ones with zero points, so that no loader reads two kinds."""
    source = tuned((4, True, 32, MLP), (4, False, 32, ATTENTION))
    for format in ("gptq", "awq", "auto_round", "mlx"):
        export(source.folder, format, tmp_path / format)
        assert_same(source, tmp_path / format)
    gptq, auto_round = (section_of(tmp_path / x) for x in ("gptq", "auto_round"))
    assert (gptq["sym"], gptq["checkpoint_format"]) == (False, "gptq_v2")
    assert "dynamic" not in gptq
    assert (auto_round["sym"], auto_round["packing_format"]) == (False, "auto_round:auto_awq")
    assert "extra_config" not in auto_round


def test_other_sources_are_refused(tmp_path):
    from conftest import tiny_llama_folder

    dense = tiny_llama_folder(torch.bfloat16, 2, 0, False)
    with pytest.raises(CheckpointError, match="no `quantization_config`"):
        export(dense, "gptq", tmp_path / "out")
    export(tuned((4, True, 32)).folder, "awq", tmp_path / "awq")
    with pytest.raises(CheckpointError, match="format awq"):
        export(tmp_path / "awq", "gptq", tmp_path / "out")


@pytest.mark.parametrize(
    ("format", "fields", "said"),
    [
        ("awq", {"num_bits": 3}, "(?s)exported to gptq, auto_round, mlx.*holds 4 bits"),
        ("gptq", {"num_bits": 5}, "(?s)exported to gguf:q5_0, gguf:q8_0.*2, 3, 4 or 8 bits"),
        ("mlx", {"group_size": -1}, "(?s)gptq, awq, auto_round.*W4A16 channel"),
        ("gptq", {"out_features": 40}, "40 x 64 features, which must be multiples of 32 and 32"),
        ("gptq", {"in_features": 96, "group_size": 64}, "no multiple of the group size"),
        ("gptq", {"kind": "embedding"}, "(?s)exported to mlx.*quantized embedding"),
        ("gguf:q2_0", {}, "(?s)gguf:q4_0.*holds 2 bits"),
        ("gguf:q2_0", {"num_bits": 2}, "(?s)gguf:q4_0.*W2A16 G32: .*multiples of 64"),
        ("gguf:q2_0", {"num_bits": 2, "symmetric": False}, "(?s)gguf:q4_0.*holds no zero points"),
        ("gguf:q4_0", {"symmetric": False}, "(?s)gguf:q5_0.*zero points with 2 or 3 bits"),
        ("gguf:q8_0", {"symmetric": False, "num_bits": 8}, "(?s)gptq.*W8A16 asym"),
        ("gptq", {"name": "projector.linear"}, "(?s)exported to awq, mlx.*outside the blocks"),
        ("auto_round", {"kind": "head"}, "quantized head"),
    ],
)
def test_the_table_says_what_would_do(format, fields, said):
    with pytest.raises(ExportError, match=said):
        check_format(FORMATS[format], [spec(**fields)], [])


def test_a_name_that_contains_another_is_refused_by_awq():
    layers = [spec(name="model.layers.0.mlp.gate_proj")]
    with pytest.raises(ExportError, match="contain that of a layer not quantized"):
        check_format(FORMATS["awq"], layers, ["model.layers.0.mlp.gate"])
    check_format(FORMATS["gptq"], layers, ["model.layers.0.mlp.gate"])


def test_names_of_other_models():
    """Other module lists than `model.layers`; layers of a vision encoder that is not quantized."""
    layers = [spec(name=f"transformer.h.{i}.attn.c_attn") for i in range(2)]
    skipped = ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc", "vision.blocks.0.fc"]
    config = gptq_config(layers, [*skipped, "lm_head"])
    assert config["modules_in_block_to_quantize"] == [["attn.c_attn"]]
    assert set(config["dynamic"]) == {
        r"-:^(?:.*\.)?h\.(?:0|1)\.(?:mlp\.c_fc)$",
        r"-:^(?:.*\.)?blocks\.(?:0)\.(?:fc)$",
    }
    config = auto_round_config(layers, [*skipped, "lm_head"])
    assert config["block_name_to_quantize"] == "transformer.h"
    assert set(config["extra_config"]) == set(skipped)


def test_an_unknown_format():
    with pytest.raises(ExportError, match="no format `exl3`; use one of gptq, awq"):
        export(tuned((4, True, 32)).folder, "exl3", "out")


def test_folders(tmp_path):
    source = tuned((4, True, 32)).folder
    for output in (source, source / "inside", source.parent):
        with pytest.raises(OutputExistsError):
            export(source, "gptq", output, overwrite=True)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        export(source, "gptq", tmp_path)
    export(source, "gptq", tmp_path, overwrite=True)
    assert (tmp_path / "quantize_config.json").exists()
    export(source, "awq", tmp_path, overwrite=True)
    assert section_of(tmp_path)["quant_method"] == "awq"
    assert not (tmp_path / "quantize_config.json").exists()
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_nothing_is_left_of_a_failed_export(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(written_files, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        export(tuned((4, True, 32)).folder, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
