"""Models released in FP8 and MXFP4 are loaded in 16 bits; compressed ones are refused."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import VOCABULARY, quantize, tiny_llama, tiny_tokenizer, weight_scheme
from helpers import saved_tensors
from released import BLOCK, edit_config, fp8_blocks, store_experts_in_mxfp4, store_in_fp8
from tiny_mixtures import DEEPSEEK
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from autoround_modifier import AutoRoundModifier, CompressedSourceError, load_model
from autoround_modifier.formats.fp8_blocks import dequantize_fp8_blocks
from autoround_modifier.host.loading import check_not_compressed, source_config, stored_format

# kv_a_proj_with_mqa has 192 rows, which blocks of 128 do not divide (576 in the release)
TINY = {**DEEPSEEK, "hidden_size": 256, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64}


@pytest.fixture
def deepseek(tmp_path):
    """:return: folder of a release in FP8, and what its weights mean"""
    folder = tmp_path / "deepseek"
    DeepseekV3ForCausalLM(DeepseekV3Config(**TINY)).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, store_in_fp8(folder, lambda name: "_proj" in name)


def modifier(**fields):
    return AutoRoundModifier(
        iters=1,
        batch_size=4,
        ignore=["lm_head"],
        config_groups={"group_0": weight_scheme()},
        min_expert_tokens=1,
        **fields,
    )


def test_blocks_at_the_edge_have_scales_of_their_own():
    weight = torch.randn(192, 320)
    stored, scales, product = fp8_blocks(weight)
    assert scales.shape == (2, 3)
    assert torch.equal(dequantize_fp8_blocks(stored, scales, (BLOCK, BLOCK)), product)
    exponents = torch.tensor([[127, 128, 129], [126, 125, 124]], dtype=torch.uint8)
    powers = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.25, 0.125]])
    assert torch.equal(
        dequantize_fp8_blocks(stored, exponents, (BLOCK, BLOCK)),
        dequantize_fp8_blocks(stored, powers, (BLOCK, BLOCK)),
    )
    with pytest.raises(ValueError, match=r"\(192, 320\).*\(3, 3\)"):
        dequantize_fp8_blocks(stored, torch.ones(3, 3), (BLOCK, BLOCK))


def test_fp8_is_dequantized_as_it_is_loaded(deepseek, tmp_path):
    folder, meant = deepseek
    before = get_checkpoint_conversion_mapping("deepseek_v3")
    model = load_model(folder)
    assert model.dtype == torch.bfloat16
    assert any(".experts.3." in name for name in meant)
    for name, weight in meant.items():
        assert torch.equal(model.get_parameter(name), weight), name
    assert str(get_checkpoint_conversion_mapping("deepseek_v3")) == str(before)

    model.save_pretrained(tmp_path / "saved")  # as it is, not in FP8 again
    saved = saved_tensors(tmp_path / "saved")
    assert not [name for name in saved if "scale_inv" in name]
    for name, weight in meant.items():
        assert torch.equal(saved[name], weight), name
    assert "quantization_config" not in source_config(tmp_path / "saved")


def test_fp8_can_be_loaded_onto_the_disk(deepseek, tmp_path):
    folder, meant = deepseek
    model = load_model(
        folder,
        device_map="auto_offload",
        max_memory={"cpu": 100_000},
        offload_folder=str(tmp_path / "offloaded"),
    )
    assert any((tmp_path / "offloaded").iterdir())
    for name, weight in meant.items():
        assert torch.equal(model.get_parameter(name), weight), name


def test_transformers_misreads_weights_that_blocks_do_not_divide(deepseek):
    """When this fails, `_dequantized_by_blocks` and `_misread_weights` may go."""
    folder, meant = deepseek
    config = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    assert not torch.equal(model.get_parameter(f"{name}.weight"), meant[f"{name}.weight"])
    with pytest.raises(CompressedSourceError, match=f"{name}.*load_model"):
        check_not_compressed(model)


def test_the_name_of_a_release_in_fp8_is_quantized(deepseek, tmp_path):
    folder, _ = deepseek
    quantize(str(folder), modifier(), output_dir=tmp_path / "quantized")
    config = source_config(tmp_path / "quantized")
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    name = "model.layers.1.mlp.experts.3.down_proj"
    saved = saved_tensors(tmp_path / "quantized")
    assert f"{name}.weight_packed" in saved
    assert not [name for name in saved if "scale_inv" in name]
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", output_loading_info=True
    )
    assert not any(info.values())
    assert again.dtype == torch.bfloat16


def test_mxfp4_is_dequantized_as_it_is_loaded(tmp_path):
    folder = tmp_path / "gpt_oss"
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    meant = store_experts_in_mxfp4(folder)
    model = load_model(folder)
    prefix = "model.layers.0.mlp.experts"
    for i in range(4):
        expert, gate_up = model.get_submodule(f"{prefix}.{i}"), meant[f"{prefix}.gate_up_proj"][i]
        assert torch.equal(expert.gate_proj.weight, gate_up[:, ::2].T)
        assert torch.equal(expert.up_proj.weight, gate_up[:, 1::2].T)
        assert torch.equal(expert.down_proj.weight, meant[f"{prefix}.down_proj"][i].T)
    quantize(str(folder), modifier(engine="none"), output_dir=tmp_path / "quantized")
    config = source_config(tmp_path / "quantized")
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    saved = saved_tensors(tmp_path / "quantized")
    assert f"{prefix}.3.down_proj.weight_packed" in saved
    assert not [name for name in saved if "_blocks" in name]


@pytest.mark.parametrize("method", ["gptq", "awq", "auto-round", "bitsandbytes", "fbgemm_fp8"])
def test_compressed_sources_are_refused_by_name(method, tmp_path):
    tiny_llama(num_layers=1).save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(CompressedSourceError, match=f"{tmp_path}.*{method}.*16 bits"):
        quantize(str(tmp_path), modifier())
    with pytest.raises(CompressedSourceError, match=method):
        load_model(tmp_path)


def test_formats_that_the_config_does_not_name(tmp_path):
    assert stored_format({}, tmp_path) is None
    (tmp_path / "hf_quant_config.json").write_text("{}")
    assert stored_format({}, tmp_path) == "modelopt"
    assert stored_format({"text_config": {"quantization_config": {"quant_method": "FP8"}}}) == "fp8"
    assert stored_format({"compression_config": {"format": "x"}}) == "compressed-tensors"


@pytest.fixture
def compressed(tmp_path):
    quantize(tiny_llama(num_layers=1), modifier(), output_dir=tmp_path / "compressed")
    return tmp_path / "compressed"


def test_what_this_package_saved_is_refused(compressed):
    with pytest.raises(CompressedSourceError, match="compressed-tensors"):
        quantize(str(compressed), modifier())
    model = LlamaForCausalLM.from_pretrained(compressed)
    with pytest.raises(CompressedSourceError, match=r"compressed-tensors.*16 bits"):
        quantize(model, modifier())


def test_weights_in_fp8_in_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(model[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(CompressedSourceError, match=r"0\.weight"):
        check_not_compressed(model)


def test_plain_models_are_loaded_as_they_are(tmp_path):
    model = tiny_llama(num_layers=1)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
