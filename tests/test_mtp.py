"""Layers for multi-token prediction, which Transformers does not load, in saved checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.utils import is_match
from conftest import VOCABULARY, quantize, tiny_llama, tiny_tokenizer, weight_scheme
from helpers import saved_integers, saved_tensors
from released import add_tensors, edit_config, fp8_blocks, store_in_fp8
from tiny_mixtures import DEEPSEEK
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from autoround_modifier import AutoRoundModifier, SchemeError, load_recipe
from autoround_modifier.checkpoints.mtp import mtp_expressions, mtp_names, renumbered
from autoround_modifier.checkpoints.saved_files import tensor_files
from autoround_modifier.modifiers import mtp

LINEAR = nn.Linear(1, 1, device="meta")
DEEPSEEK_MTP = {
    "model.layers.2.eh_proj.weight": (128, 256),
    "model.layers.2.enorm.weight": (128,),
    "model.layers.2.self_attn.q_a_proj.weight": (128, 128),
    "model.layers.2.mlp.experts.0.gate_proj.weight": (128, 128),
    "model.layers.2.mlp.gate.weight": (4, 128),
    "model.layers.2.embed_tokens.weight": (VOCABULARY, 128),
}
QWEN_MTP = {
    "mtp.fc.weight": (64, 128),
    "mtp.layers.0.self_attn.q_proj.weight": (64, 64),
    "mtp.layers.0.self_attn.k_proj.weight": (32, 64),
    "mtp.norm.weight": (64,),
}


def released(folder, model, extra, **fields):
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in extra.items()}
    add_tensors(folder, tensors)
    edit_config(folder, **fields)
    return tensors


def deepseek(folder):
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK))
    return released(folder, model, DEEPSEEK_MTP, num_nextn_predict_layers=1)


def qwen(folder, **fields):
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        max_position_embeddings=64,
    )
    return released(folder, Qwen3_5ForCausalLM(config), QWEN_MTP, **fields)


def glm(folder):
    config = Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        max_position_embeddings=64,
    )
    extra = {"model.layers.2.eh_proj.weight": (64, 128), "model.layers.2.hnorm.weight": (64,)}
    return released(folder, Glm4MoeForCausalLM(config), extra, num_nextn_predict_layers=1)


def modifier(*targets, **fields):
    groups = {"group_0": weight_scheme()}
    if targets:
        groups["mtp"] = weight_scheme(8, targets=targets)
    return AutoRoundModifier(
        preset="rtn", ignore=["lm_head"], config_groups=groups, min_expert_tokens=0, **fields
    )


def saved(folder):
    return saved_tensors(folder), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (deepseek, "num_nextn_predict_layers"),
        (glm, "num_nextn_predict_layers"),
        (lambda folder: qwen(folder, mtp_num_hidden_layers=1), "mtp_num_hidden_layers"),
        (qwen, None),
    ],
    ids=["deepseek", "glm", "qwen3.5", "qwen3-next, whose config says nothing"],
)
def test_they_are_kept_in_16_bits_and_ignored_under_their_names(make, field, tmp_path):
    extra = make(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    quantize(model, modifier(), output_dir=tmp_path / "quantized")
    tensors, config = saved(tmp_path / "quantized")
    index = json.loads((tmp_path / "quantized" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    for name, tensor in extra.items():
        assert torch.equal(tensors[name], tensor)
        assert index["weight_map"][name] == "model_mtp.safetensors"
        if tensor.ndim == 2:
            ignored = config["quantization_config"]["ignore"]
            assert is_match(name.removesuffix(".weight"), LINEAR, ignored)
    own = [name.removesuffix(".weight_packed") for name in tensors if "_packed" in name]
    assert own
    assert not [name for name in own if is_match(name, LINEAR, ignored)]
    assert {"num_nextn_predict_layers", "mtp_num_hidden_layers"} & set(config) == {field} - {None}
    assert field is None or config[field] == 1
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not info["missing_keys"]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (deepseek, "num_nextn_predict_layers"),
        (lambda folder: qwen(folder, mtp_num_hidden_layers=1), "mtp_num_hidden_layers"),
    ],
    ids=["deepseek", "qwen3.5"],
)
def test_dropped_layers_are_not_promised(make, field, tmp_path):
    make(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    quantize(model, modifier(mtp="drop"), output_dir=tmp_path / "quantized")
    tensors, config = saved(tmp_path / "quantized")
    assert not mtp_names(tensors, 2, True)
    assert config[field] == 0
    assert not (tmp_path / "quantized" / "model_mtp.safetensors").exists()
    assert "mtp: drop" in (tmp_path / "quantized" / "recipe.yaml").read_text()


def test_layers_in_fp8_are_dequantized(tmp_path):
    extra = deepseek(tmp_path / "original")
    meant = store_in_fp8(tmp_path / "original", lambda name: "_proj" in name)
    recipe = load_recipe("deepseek_r1_int2_mixed", iters=1, batch_size=4, min_expert_tokens=1)
    quantize(str(tmp_path / "original"), recipe, output_dir=tmp_path / "quantized")
    tensors, config = saved(tmp_path / "quantized")
    for name, tensor in extra.items():
        assert torch.equal(tensors[name], meant.get(name, tensor))
        assert tensors[name].dtype == torch.bfloat16
    assert not [name for name in tensors if "scale_inv" in name]
    expert = "model.layers.1.mlp.experts.3.down_proj"
    assert saved_integers(tensors, expert, 2).unique().tolist() == [-2, -1, 0, 1]
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    # the expression for the experts of the model does not mean those of this layer
    name = "model.layers.2.mlp.experts.0.gate_proj"
    assert is_match(name, LINEAR, quantization["ignore"])
    assert config["num_nextn_predict_layers"] == 1
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not info["missing_keys"]


def test_a_target_of_their_own_quantizes_them(tmp_path):
    extra = qwen(tmp_path / "original", mtp_num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    quantize(model, modifier(r"re:^mtp\..*_proj$"), output_dir=tmp_path / "quantized")
    tensors, config = saved(tmp_path / "quantized")
    quantization = config["quantization_config"]
    (group,) = [
        group
        for group in quantization["config_groups"].values()
        if group["targets"] == [r"re:^mtp\..*_proj$"]
    ]
    assert group["weights"]["num_bits"] == 8
    assert group["format"] == "pack-quantized"
    for name in ("mtp.layers.0.self_attn.q_proj", "mtp.layers.0.self_attn.k_proj"):
        weight = extra[f"{name}.weight"]
        integers = saved_integers(tensors, name, 8).float()
        scale = tensors[f"{name}.weight_scale"].float().repeat_interleave(32, 1)
        error = (integers * scale - weight.float()).norm() / weight.float().norm()
        assert 0 < error < 0.01
        assert not is_match(name, LINEAR, quantization["ignore"])
        assert f"{name}.weight" not in tensors
    assert torch.equal(tensors["mtp.fc.weight"], extra["mtp.fc.weight"])
    assert is_match("mtp.fc", LINEAR, quantization["ignore"])
    assert "mtp.norm" not in quantization["ignore"]


def test_a_scheme_of_gguf_leaves_them_in_16_bits(log, tmp_path):
    extra = qwen(tmp_path / "original", mtp_num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    targets = ["Linear", r"re:^mtp\..*_proj$"]
    tuner = AutoRoundModifier(scheme="gguf:q4_k", preset="rtn", ignore=["lm_head"], targets=targets)
    quantize(model, tuner, output_dir=tmp_path / "quantized")
    tensors, config = saved(tmp_path / "quantized")
    assert "quantization_config" not in config
    assert all(torch.equal(tensors[name], tensor) for name, tensor in extra.items())
    assert any("mtp" in line and "match" in line for line in log)


def test_a_scheme_that_does_not_fit_is_refused(tmp_path):
    extra = {**QWEN_MTP, "mtp.odd_proj.weight": (64, 40)}
    qwen(tmp_path / "original")
    add_tensors(tmp_path / "original", {"mtp.odd_proj.weight": torch.randn(extra.popitem()[1])})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    with pytest.raises(SchemeError, match=r"mtp\.odd_proj: group_size 32 .* 40 input features"):
        quantize(model, modifier(r"re:^mtp\..*_proj$"))


def test_a_promise_without_weights_is_taken_back(log, tmp_path):
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK, num_nextn_predict_layers=1))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    quantize(model, modifier(), output_dir=tmp_path / "quantized")
    assert saved(tmp_path / "quantized")[1]["num_nextn_predict_layers"] == 0
    assert any("does not have" in line for line in log)


def test_a_source_that_is_gone_is_said(log, tmp_path):
    deepseek(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    model.config._name_or_path = "nobody/nowhere"
    model.name_or_path = "nobody/nowhere"
    quantize(model, modifier())
    assert any("WARNING" in line and "nobody/nowhere" in line for line in log)


def test_a_source_that_goes_during_the_run_is_said(log, tmp_path):
    deepseek(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    quantize(model, modifier())
    (tmp_path / "original" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "quantized")
    tensors, config = saved(tmp_path / "quantized")
    assert config["num_nextn_predict_layers"] == 0
    assert not mtp_names(tensors, 2, True)
    assert any("ERROR" in line and "multi-token" in line for line in log)


def test_large_layers_are_in_several_files(tmp_path, monkeypatch):
    extra = deepseek(tmp_path / "original")
    monkeypatch.setattr(mtp, "MAX_FILE_BYTES", 40_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    quantize(model, modifier(), output_dir=tmp_path / "quantized")
    assert len(list((tmp_path / "quantized").glob("model_mtp*.safetensors"))) > 2
    tensors, _ = saved(tmp_path / "quantized")
    assert set(tensor_files(tmp_path / "quantized")) == set(tensors) >= set(extra)
    model.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    assert set(saved(tmp_path / "quantized")[0]) == set(tensors)  # none of an earlier save is left


def test_layers_follow_the_last_one_of_a_shorter_model(tmp_path):
    extra = deepseek(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", num_hidden_layers=1)
    quantize(model, modifier(), output_dir=tmp_path / "quantized")
    tensors, config = saved(tmp_path / "quantized")
    assert config["num_hidden_layers"] == 1
    for name, tensor in extra.items():
        assert torch.equal(tensors[name.replace("layers.2", "layers.1")], tensor)
    assert not [name for name in tensors if "layers.2." in name]


@pytest.mark.parametrize(
    ("name", "expression"),
    [
        ("mtp.fc.weight", r"re:^mtp\..*"),
        ("model.mtp.layers.0.norm.weight", r"re:^model\.mtp\..*"),
        ("model.mtp_block.0.mlp.up_proj.weight", r"re:^model\.mtp_block\..*"),
        (
            "model.language_model.layers.16.eh_proj.weight",
            r"re:^model\.language_model\.layers\.16\..*",
        ),
    ],
)
def test_names_of_all_kinds(name, expression):
    own = [f"model.language_model.layers.{i}.mlp.up_proj.weight" for i in range(16)]
    own += [f"model.visual.layers.{i}.mlp.up_proj.weight" for i in range(24)]
    assert mtp_names([*own, name], 16, promised=True) == [name]
    assert mtp_expressions([name]) == [expression]
    assert is_match(name.removesuffix(".weight"), LINEAR, expression)
    assert not [x for x in own if is_match(x.removesuffix(".weight"), LINEAR, expression)]
    assert mtp_names(own, 16, promised=True) == []
    assert renumbered(name, 16, 16) == name


def test_layers_after_the_last_one_need_a_promise():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    assert mtp_names(names, 2, promised=False) == []
    assert mtp_names(names, 2, False, [r"model\.layers\.2.*"]) == names[2:]


def test_models_without_them_are_saved_as_before(tmp_path):
    quantize(tiny_llama(), modifier(), output_dir=tmp_path)
    assert not list(tmp_path.glob("*index*"))
    assert not [name for name in saved(tmp_path)[1] if "mtp" in name or "nextn" in name]


def test_fp8_blocks_of_the_tests():
    stored, scales, product = fp8_blocks(torch.randn(130, 4))
    assert stored.shape == product.shape == (130, 4)
    assert scales.shape == (2, 1)
