"""What is saved loads in the engines that were asked for, or is refused before anything runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import quantize, tiny_llama, weight_scheme
from tiny_mixtures import tiny_mixture
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from autoround_modifier import (
    AutoRoundModifier,
    AutoSchemeModifier,
    CheckpointError,
    RecipeError,
    check_checkpoint,
    load_recipe,
    quantized_weights,
)
from autoround_modifier.blocks.store import CalibrationStore
from autoround_modifier.checkpoints import check
from autoround_modifier.engines.layout import CheckpointLayout, TensorLayout
from autoround_modifier.engines.vllm_loader import vllm_problems
from autoround_modifier.modifiers import finishing

ATTENTION, MLP = r"re:.*self_attn\..*_proj$", r"re:.*mlp\..*_proj$"


def groups(**targets: tuple[int, str]) -> dict:
    """:param targets: config group -> bits and target"""
    return {
        name: {**weight_scheme(bits), "targets": [target]}
        for name, (bits, target) in targets.items()
    }


def rounding(**fields) -> AutoRoundModifier:
    return AutoRoundModifier(preset="rtn", **{"ignore": ["lm_head"], **fields})


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def check_reloads_exactly(model: PreTrainedModel, recipe, folder: Path, within: float = 0) -> None:
    """
    :param within: relative error. Fused experts of Transformers may add up in another order than
        linear layers
    """
    quantize(model, recipe, output_dir=folder)
    expected = logits(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert float((logits(loaded) - expected).norm() / expected.norm()) <= within
    assert check_checkpoint(folder) == []


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("a block ran")

    monkeypatch.setattr(CalibrationStore, "enter", refuse)


# ------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize(
    "name", ["w4a16_autoround", "w2a16_w4a16_mixed_autoround", "fp8_w2a16_mixed_autoround"]
)
def test_shipped_recipes_reload_exactly_with_experts(name, tmp_path):
    model = tiny_mixture(tmp_path / "original", split=False)
    check_reloads_exactly(model, load_recipe(name, preset="rtn"), tmp_path / "saved")


@pytest.mark.parametrize("prefix", ["Mixtral", "MiniMaxM2", "Phimoe"])
def test_experts_under_the_names_of_the_release_reload(prefix, tmp_path):
    model = tiny_mixture(tmp_path / "original", prefix, split=False, dtype=torch.float32)
    recipe = rounding(config_groups=groups(attention=(8, ATTENTION), experts=(4, MLP)))
    check_reloads_exactly(model, recipe, tmp_path / "saved", within=1e-5)


def test_chosen_schemes_reload_exactly_with_experts(tmp_path):
    model = tiny_mixture(tmp_path / "original", split=False)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for parameter in layer.mlp.experts.parameters():
                parameter.mul_(0.3 + 0.5 * index)  # blocks of different sensitivity
    scheme = AutoSchemeModifier(
        avg_bits=3.5, options=["W2A16G32", "W4A16G32", "W8A16G32"], cache_dir=False
    )
    check_reloads_exactly(model, [scheme, rounding()], tmp_path / "saved")


def test_a_choice_for_vllm_may_differ_between_blocks_of_experts(tmp_path):
    options = ["W2A16G32", "W4A16G32", "W4A16_ASYM_G32"]
    units = {}
    for engine in ("vllm", "any"):
        scheme = AutoSchemeModifier(avg_bits=3.5, options=options, cache_dir=False, engine=engine)
        model = tiny_mixture(tmp_path / engine, split=False)
        quantize(model, [scheme, rounding()])
        units[engine] = [x for x in scheme.choice.measurement.units if "experts" in x.layers[0]]
    assert [set(unit.bits) for unit in units["vllm"]] == [set(options)] * 2
    assert [set(unit.bits) for unit in units["any"]] == [set(options[:2])]


def test_options_that_experts_cannot_have_are_refused(tmp_path, nothing_runs):
    scheme = AutoSchemeModifier(
        avg_bits=4.2, options=["W4A16_ASYM_G32", "NVFP4A16"], cache_dir=False
    )
    with pytest.raises(ValueError, match="Add a symmetric integer scheme"):
        quantize(tiny_mixture(tmp_path, split=False), [scheme, rounding()])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "W4A16_ASYM"}, "does not read experts with zero points"),
        ({"scheme": "NVFP4A16"}, "drops the global scales of NVFP4 experts"),
        ({"scheme": "W8A8"}, "reads packed experts only"),
        ({"scheme": "MXFP8"}, "does not read MXFP8 experts"),
        ({"scheme": "FP8_BLOCK"}, "does not read FP8 experts by block"),
        ({"scheme": "W4A16", "ignore": ["lm_head", "re:.*experts.*"]}, "that are not quantized"),
        (
            {"config_groups": groups(a=(4, r"re:.*layers\.0\..*_proj"), b=(2, "Linear"))},
            "reads all experts of a model by one scheme, and these have 2",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_experts_that_transformers_misreads_are_refused_unless_vllm_is_meant(
    fields, message, tmp_path, log, nothing_runs
):
    model = tiny_mixture(tmp_path, split=False)
    with pytest.raises(RecipeError, match=message) as caught:
        quantize(model, rounding(**fields))
    assert "Transformers 5" in str(caught.value)
    assert "engine: vllm" in str(caught.value)
    quantize(model, rounding(**fields, engine="vllm"))  # the same object: nothing was done to it
    assert any(message in line for line in log)


def test_experts_that_vllm_cannot_compute_are_refused(tmp_path, nothing_runs):
    mixed = groups(up=(4, r"re:.*(gate|up)_proj$"), down=(8, r"re:.*down_proj$"))
    model = tiny_mixture(tmp_path, split=False)
    with pytest.raises(RecipeError, match="vLLM: computes the experts of a block by one scheme"):
        quantize(model, rounding(config_groups=mixed))


@pytest.mark.parametrize("prefix", ["GptOss", "GraniteMoe"])
def test_experts_that_transformers_reads_fused_only_are_refused(prefix, tmp_path, nothing_runs):
    model = tiny_mixture(tmp_path, prefix, split=False)
    with pytest.raises(RecipeError, match="from one tensor only"):
        quantize(model, rounding(scheme="W4A16"))


# ------------------------------------------------------------------------- dense models


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"scheme": "W4A16", "ignore": ["lm_head", "re:.*k_proj$"]}, "q_proj, k_proj, v_proj"),
        ({"scheme": "W4A16", "targets": [r"re:.*[qo]_proj$"]}, "q_proj, k_proj, v_proj"),
        ({"config_groups": groups(a=(8, "re:.*v_proj$"), b=(4, "Linear"))}, "q_proj, k_proj"),
        ({"config_groups": groups(a=(2, "re:.*gate_proj$"), b=(4, "Linear"))}, "gate_proj, up"),
    ],
    ids=["ignored", "not targeted", "v in 8 bits", "gate in 2 bits"],
)
def test_schemes_that_split_fused_layers_are_refused(fields, layers, nothing_runs):
    if "scheme" in fields:
        del fields["scheme"]
        target = fields.pop("targets", ["Linear"])
        fields["config_groups"] = {"group_0": {**weight_scheme(4), "targets": target}}
    with pytest.raises(RecipeError, match=f"vLLM: fuses {layers}"):
        quantize(tiny_llama(), rounding(**fields))
    quantize(tiny_llama(), rounding(**fields, engine="transformers"))


def test_overlapping_expressions_are_saved_apart(tmp_path, log):
    """vLLM would take the first in the file, compressed-tensors the first in the alphabet."""
    recipe = rounding(config_groups=groups(a=(4, "re:.*proj"), b=(8, "re:.*down_proj")))
    check_reloads_exactly(tiny_llama(), recipe, tmp_path)
    bits = {
        name: int(weight.values.max()).bit_length() + 1
        for name, weight in quantized_weights(tmp_path).items()
    }
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["model.layers.0.mlp.up_proj"] == 4
    (warning,) = (line for line in log if "both match" in line)
    assert "`re:.*down_proj` of b and `re:.*proj` of a" in warning


def test_a_class_that_transformers_does_not_load_packed_is_refused(tmp_path, nothing_runs):
    config = FalconConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = FalconForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(RecipeError, match="'FalconLinear' object has no attribute 'weight'"):
        quantize(model, rounding(config_groups={"group_0": weight_scheme(4)}))


def test_state_space_layers_that_vllm_has_in_16_bits_are_refused(tmp_path, nothing_runs):
    config = MambaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=1, state_size=8, time_step_rank=32
    )
    model = MambaForCausalLM(config).bfloat16()
    with pytest.raises(RecipeError, match=r"Mamba 1 in 16 bits only.*re:\.\*\\\.mixer\\"):
        quantize(model, rounding(config_groups={"group_0": weight_scheme(4)}, engine="vllm"))


@pytest.mark.parametrize("model_type", ["internvl", "llava"])
def test_vision_attention_that_vllm_has_in_16_bits_is_found(model_type):
    names = ("attention.q_proj", "attention.projection_layer", "mlp.fc1")
    layers = [f"model.vision_tower.encoder.layer.0.{name}" for name in names]
    tensors = {
        f"{layer}.{part}": TensorLayout((64, 8), torch.int32)
        for layer in layers
        for part in ("weight_packed", "weight_scale")
    }
    groups = {"group_0": {"targets": ["Linear"], **weight_scheme(4)}}
    config = {"model_type": model_type, "quantization_config": {"config_groups": groups}}
    problems = vllm_problems(CheckpointLayout(config, tensors))
    if model_type != "internvl":
        assert problems == []
        return
    (problem,) = problems
    assert "attention of this vision tower in 16 bits only" in problem.what
    assert problem.names == tuple(layers[:2])
    (expression,) = re.findall(r"`re:(.*?)`", problem.remedy)
    assert [bool(re.match(expression, layer)) for layer in layers] == [True, True, False]


def test_an_architecture_that_does_not_run_quantized_is_refused(tmp_path, nothing_runs):
    config = CTRLConfig(vocab_size=128, n_positions=32, n_embd=64, dff=64, n_layer=1, n_head=4)
    CTRLLMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = CTRLLMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(RecipeError, match="runs no quantized CTRL"):
        quantize(model, rounding(config_groups={"group_0": weight_scheme(4)}))


# ------------------------------------------------------------------------- saved checkpoints


@pytest.fixture
def saved(tmp_path) -> Path:
    quantize(
        tiny_llama(), rounding(config_groups={"group_0": weight_scheme(4)}), output_dir=tmp_path
    )
    return tmp_path


def changed(folder: Path, **fields) -> None:
    """:param fields: of ``quantization_config``"""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_sound_checkpoint_has_no_problems(saved):
    assert check_checkpoint(saved) == []


def test_a_layer_that_is_not_in_ignore_is_found(saved):
    changed(saved, ignore=[])
    missing = [x for x in check_checkpoint(saved) if "does not find tensors" in x.what]
    assert [x.engine.split()[0] for x in missing] == ["Transformers"]
    assert "lm_head.weight_packed" in missing[0].names


def test_a_quantized_layer_in_ignore_is_found(saved):
    changed(saved, ignore=["lm_head", "re:.*layers.0.mlp.*"])
    problems = check_checkpoint(saved, engine="vllm")
    assert [x.what for x in problems] == ["takes quantized layers for layers in 16 bits"]
    assert "model.layers.0.mlp.down_proj" in problems[0].names


def test_groups_in_an_order_that_vllm_misreads_are_found(tmp_path):
    recipe = rounding(config_groups=groups(a=(4, "re:.*proj"), b=(8, "re:.*down_proj")))
    quantize(tiny_llama(), recipe, output_dir=tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    by_bits = {x["weights"]["num_bits"]: x for x in section["config_groups"].values()}
    by_bits[4]["targets"], by_bits[8]["targets"] = ["re:.*proj"], ["re:.*down_proj"]
    changed(tmp_path, config_groups={"group_0": by_bits[4], "group_1": by_bits[8]})
    (problem,) = check_checkpoint(tmp_path)
    assert "takes the first target" in problem.what
    assert problem.names[0] == "model.layers.0.mlp.down_proj"


def test_what_cannot_be_read_is_named(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="unknown engine `sglang`"):
        check_checkpoint(saved, engine="sglang")


# ------------------------------------------------------------------------- targets and ignore


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("*lm_head", "did you mean `lm_head`?"),
        ("down_proj", r"did you mean `re:.*\.down_proj$`?"),
        ("model.layers.0", r"did you mean `re:model\.layers\.0\..*`?"),
        ("re:.*dwn_proj", "the nearest layers are named `down_proj`"),
        ("xyz", "layers are named like "),
    ],
)
def test_entries_of_ignore_that_match_nothing_are_said(entry, hint, log):
    recipe = rounding(ignore=["lm_head", entry], config_groups={"group_0": weight_scheme(4)})
    quantize(tiny_llama(), recipe)
    (warning,) = (line for line in log if "matches no layer" in line)
    assert re.search(f"`ignore`: `{re.escape(entry)}` matches no layer; .*", warning)
    assert hint in warning


def test_targets_of_a_group_that_match_nothing_are_said(log):
    recipe = rounding(config_groups=groups(a=(8, "re:.*attn.qkv"), b=(4, "Linear")))
    quantize(tiny_llama(), recipe)
    (warning,) = (line for line in log if "matches no layer" in line)
    assert "`targets` of a: `re:.*attn.qkv` matches no layer" in warning


def test_a_group_that_gets_no_layer_is_said(log):
    recipe = rounding(config_groups=groups(all=(4, "re:.*proj"), q=(8, "re:.*q_proj")))
    quantize(tiny_llama(), recipe)
    (warning,) = (line for line in log if "both match" in line)
    assert "It gets no layer at all." in warning


def test_a_recipe_without_doubt_says_nothing(log):
    quantize(tiny_llama(), rounding(config_groups=groups(a=(8, ATTENTION), b=(4, MLP))))
    assert [x for x in log if re.match("WARNING.*(match|checkpoint)", x)] == []


def test_a_check_that_fails_stops_no_run(tmp_path, monkeypatch, log):
    def fail(*args, **kwargs):
        raise KeyError("unknown")

    monkeypatch.setattr(check, "find_problems", fail)
    monkeypatch.setattr(finishing, "quantization_section", fail)
    quantize(
        tiny_llama(), rounding(config_groups={"group_0": weight_scheme(4)}), output_dir=tmp_path
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
    said = [line for line in log if "KeyError" in line]
    assert [line.split()[0] for line in said] == ["WARNING", "ERROR", "ERROR"]
