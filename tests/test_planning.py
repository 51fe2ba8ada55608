"""planning/: what a run takes, beside what it took, and what to change where it does not fit."""

from __future__ import annotations

import functools
import json
import re
import sys
import time

import huggingface_hub.constants
import pytest
import torch
from conftest import ROOT, quantize, tiny_llama, tiny_llama_folder, weight_scheme
from helpers import saved_tensors
from tiny_mixtures import tiny_mixture

from autoround_modifier import AutoRoundModifier, AutoSchemeModifier, ScaleDistillationModifier
from autoround_modifier.cli.main import main
from autoround_modifier.errors import CompressedSourceError, RecipeError, SchemeError
from autoround_modifier.planning import Plan, find_machine, plan
from autoround_modifier.planning.hardware import DEVICES, find_device, parse_size
from autoround_modifier.planning.quantities import total
from autoround_modifier.scheme_names import group_named

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tests" / "architectures"))
from catalogue import CATALOGUE
from released_configs import (
    DEEPSEEK_R1,
    LLAMA_3_1_8B,
    LLAMA_3_1_70B,
    QWEN3_30B_A3B,
    configuration,
)

LARGE = find_machine("b200", "10TB", "10TB")
H100 = find_machine("h100", "2TB", "10TB")


# Blocks are those of the whole model; what depends on their number is small.
SHORT_LLAMA = {**LLAMA_3_1_8B, "num_hidden_layers": 2}
SHORT_QWEN3 = {**QWEN3_30B_A3B, "num_hidden_layers": 2}


def folder_of(path, fields) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


@functools.cache
def planned_deepseek() -> Plan:
    return plan(configuration(DEEPSEEK_R1), "deepseek_r1_int2_mixed", machine=H100)


# ---------------------------------------------------------------------- what is saved


def assert_predicted(model, recipe, folder) -> None:
    predicted = plan(model.config, recipe, machine=LARGE)
    assert predicted.counts.parameters == model.num_parameters()
    quantize(model, recipe, output_dir=folder)
    saved = sum(tensor.nbytes for tensor in saved_tensors(folder).values())
    assert predicted.checkpoint.value == saved
    assert sum(part.original for part in predicted.counts.parts) == predicted.counts.size


def test_a_checkpoint_has_the_predicted_size(tmp_path):
    """All kinds of schemes in one model, with tied embeddings and a quantized cache."""
    by_layer = {
        "q_proj": "W4A16",
        "k_proj": "W4A16_ASYM",
        "v_proj": "W8A8",
        "o_proj": "FP8",
        "gate_proj": "FP8_BLOCK",
        "up_proj": "NVFP4",
        r"0\.mlp\.down_proj": "MXFP4",
        r"1\.mlp\.down_proj": "MXFP8A16",
    }
    groups = {
        f"group_{number}": {**group_named(scheme), "targets": [f"re:.*{layer}$"]}
        for number, (layer, scheme) in enumerate(by_layer.items())
    }
    recipe = AutoRoundModifier(
        preset="rtn",
        engine="none",
        config_groups=groups,
        kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    )
    assert_predicted(tiny_llama(hidden_size=128, tied=True), recipe, tmp_path)


def test_embeddings_that_are_quantized(tmp_path):
    groups = {"group_0": weight_scheme(4, targets=["Linear", "Embedding"])}
    recipe = AutoRoundModifier(preset="rtn", config_groups=groups, engine="none")
    assert_predicted(tiny_llama(tied=False), recipe, tmp_path)


def test_experts_count_as_often_as_they_are_there(tmp_path):
    recipe = AutoRoundModifier(
        preset="rtn", ignore=["lm_head"], config_groups={"group_0": weight_scheme(3)}
    )
    model = tiny_mixture(tmp_path / "original", "Qwen3Moe")
    assert_predicted(model, recipe, tmp_path / "saved")


def test_a_recipe_may_tell_one_expert_from_another(tmp_path):
    groups = {
        "first": {**weight_scheme(8), "targets": [r"re:.*experts\.0\..*"]},
        "others": {**weight_scheme(4), "targets": [r"re:.*experts\.\d+\..*"]},
    }
    recipe = AutoRoundModifier(preset="rtn", config_groups=groups, engine="none")
    model = tiny_mixture(tmp_path / "original")
    alike = AutoRoundModifier(preset="rtn", config_groups={"all": groups["others"]}, engine="none")
    active = [
        [block.active for block in plan(model.config, one, machine=LARGE).counts.blocks]
        for one in (recipe, alike)
    ]
    assert active[0] == active[1]
    assert_predicted(model, recipe, tmp_path / "saved")


def test_choosing_bits_gives_at_most_the_budget():
    recipe = [
        AutoSchemeModifier(avg_bits=3.0, options=["W2A16G64", "W8A16G64"]),
        AutoRoundModifier(),
    ]
    config = configuration(SHORT_LLAMA)
    found = plan(config, recipe, machine=LARGE)
    rest = sum(part.original for part in found.counts.parts if part.scheme == "bfloat16")
    assert found.checkpoint.value == pytest.approx(3.0 / 8 * found.counts.chosen + rest)
    assert any("AutoSchemeModifier" in note for note in found.notes)
    recipe[0] = AutoSchemeModifier(avg_bits=2.1, options=["W2A16G64", "W8A16G64"])
    with pytest.raises(SchemeError, match=r"smallest option takes 2\.250"):
        plan(config, recipe, machine=LARGE)


# ---------------------------------------------------------------------- known models


def test_a_config_alone_is_enough(tmp_path):
    started = time.process_time()
    found = plan(folder_of(tmp_path / "model", LLAMA_3_1_8B), "w2a16_autoround", machine=H100)
    assert time.process_time() - started < 10
    assert found.counts.parameters == pytest.approx(8.030e9, rel=1e-4)
    assert found.checkpoint.value == pytest.approx(4.06e9, rel=0.01)
    assert found.fits
    assert all(block.counted for block in found.counts.blocks)
    assert total(found.seconds) > 0


def test_vision_blocks_are_counted():
    text = {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }
    config = configuration(
        {"model_type": "gemma3", "text_config": text, "vision_config": vision, "dtype": "bfloat16"}
    )
    found = plan(config, scheme="W4A16G32", machine=LARGE)
    reached = {block.runs_on_text for block in found.counts.blocks}
    assert reached == {True, False}
    assert any("does not reach" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("Jamba", True),
        ("Gemma 3n", True),
        ("gpt-oss", True),
        ("Llama 4", True),
        ("Qwen2.5-VL, vision tower too", True),
        ("OPT", False),
    ],
)
def test_other_architectures(name, counted):
    (architecture,) = (x for x in CATALOGUE if x.name == name)
    groups = {"group_0": weight_scheme(4, group_size=16)}
    recipe = AutoRoundModifier(config_groups=groups, ignore=["lm_head", *architecture.ignore])
    found = plan(architecture.config(), recipe, machine=LARGE)
    reached = [block for block in found.counts.blocks if block.runs_on_text]
    assert reached
    assert all(block.counted == counted for block in reached)
    assert found.peak.name.startswith("tuning ")


def test_a_model_that_cannot_run_without_content_is_assumed(monkeypatch):
    from autoround_modifier.planning import block_counts

    def fails(*args):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    config = configuration(SHORT_QWEN3)
    counted = plan(config, machine=LARGE)
    monkeypatch.setattr(block_counts, "count_passes", fails)
    assumed = plan(config, machine=LARGE)
    assert any("assumed from the shapes" in note for note in assumed.notes)
    (part,) = (x for x in assumed.peak.parts if x.name == "saved for the backward pass")
    assert part.kind == "assumed"
    assert assumed.checkpoint == counted.checkpoint
    assert assumed.peak.size == pytest.approx(counted.peak.size, rel=0.3)
    assert total(assumed.seconds) == pytest.approx(total(counted.seconds), rel=0.3)


def test_experts_cost_what_one_token_takes():
    config = configuration(SHORT_QWEN3)
    found = plan(config, machine=H100)
    (block,) = found.counts.blocks
    assert block.experts == 128 * 3 * 2048 * 768
    assert block.active == 8 * 3 * 2048 * 768
    router = 128 * 2048
    assert block.cost.products.linear == 2 * (block.dense + block.active + router)
    assert block.cost.attention.square == 4 * 32 * 128


def test_deepseek_r1():
    found = planned_deepseek()
    assert found.counts.parameters == pytest.approx(671.026e9, rel=1e-4)
    assert found.checkpoint.value == pytest.approx(185.4e9, rel=1e-3)
    parts = {part.name: part.saved for part in found.counts.parts}
    assert parts["routed experts"] == pytest.approx(173.7e9, rel=1e-3)
    assert found.fits


def test_layers_that_predict_more_tokens_are_named():
    found = planned_deepseek()
    (mtp,) = (part for part in found.disk if "multi-token" in part.name)
    assert mtp.kind == "assumed"
    assert mtp.value == pytest.approx(23.2e9, rel=0.01)
    (original,) = (part for part in found.disk if "original" in part.name)
    assert original.value == pytest.approx(671e9, rel=0.01)  # in FP8


def test_a_step_on_a_gpu_is_near_the_measured_one():
    """docs/benchmarks/gpu.md: 81.8 and 88.7 ms, 5.22 and 5.23 GiB."""
    from estimate import MEASURED_ON_H200, on_h200

    for row, (_, milliseconds, gib) in zip(on_h200()[2:], MEASURED_ON_H200, strict=True):
        _, step, _, peak, _ = (x.strip() for x in row.strip("| ").split("|"))
        assert float(step) == pytest.approx(milliseconds, rel=0.1)
        assert float(peak) == pytest.approx(gib, rel=0.05)


def names_of(parts) -> set[str]:
    return {part.name for part in parts}


def test_samples_are_on_the_device_where_they_fit():
    """128 samples of 2048 tokens: inputs, outputs, the quantized chain, and a mask each."""
    config = configuration(SHORT_LLAMA)
    found = plan(config, machine=H100)
    (kept,) = (part for part in found.peak.parts if part.name == "calibration samples")
    assert kept.value == 128 * 2048 * (3 * 4096 + 2048) * 2
    assert "tuning: copies of samples" not in names_of(found.seconds)
    on_host = plan(config, machine=H100, offload_device="cpu")
    assert "calibration samples" not in names_of(on_host.peak.parts)
    assert on_host.peak.size == found.peak.size - kept.value
    assert "tuning: copies of samples" in names_of(on_host.seconds)
    # those of the first block are on the host in both
    assert total(on_host.host) == total(found.host)


def test_a_small_device_keeps_no_samples():
    machine = find_machine("10GB", "100GB", "1TB")
    config = configuration(SHORT_LLAMA)
    found = plan(config, machine=machine)
    assert found.fits
    assert "calibration samples" not in names_of(found.peak.parts)
    forced = plan(config, machine=machine, offload_device="none")
    assert "calibration samples" in names_of(forced.peak.parts)
    assert "captured outputs" not in names_of(forced.host)
    assert "offload_device cpu" in [change.text for change in forced.advice]


# ---------------------------------------------------------------------- presets and modifiers


def test_presets_that_tune_nothing_take_less():
    config = configuration(SHORT_LLAMA)
    tuned, searched, rounded = (
        plan(config, machine=H100, preset=name) for name in ("default", "opt_rtn", "rtn")
    )
    assert tuned.peak.size > searched.peak.size > rounded.peak.size
    assert total(tuned.host) > total(searched.host) > total(rounded.host)
    assert total(tuned.seconds) > total(searched.seconds) > total(rounded.seconds)
    assert rounded.run.samples == 0
    assert tuned.checkpoint == searched.checkpoint == rounded.checkpoint


def test_scale_distillation_holds_the_whole_model():
    config = configuration(LLAMA_3_1_8B)
    found = plan(config, "w2a16_distilled_autoround", machine=H100)
    assert found.peak.name == "scale distillation"
    assert found.peak.size > found.counts.size


def test_scale_distillation_of_a_model_that_does_not_fit():
    """Half of the memory must hold its weights and integers; else it takes them one by one."""
    found = plan(configuration(LLAMA_3_1_70B), "w2a16_distilled_autoround", machine=H100)
    (phase,) = (x for x in found.phases if x.name == "scale distillation")
    assert "the whole model" not in names_of(phase.parts)
    assert phase.size < 0.3 * found.counts.size
    assert found.fits


def test_other_modifiers_are_named():
    found = plan(configuration(SHORT_LLAMA), "smoothquant_w4a16_autoround", machine=H100)
    assert "not estimated: SmoothQuantModifier" in found.notes


def test_accumulating_keeps_gradients_of_experts():
    config = configuration(SHORT_QWEN3)
    once = plan(config, machine=H100, batch_size=4)
    more = plan(config, machine=H100, batch_size=4, gradient_accumulate_steps=2)
    (block,) = once.counts.blocks
    assert more.peak.size - once.peak.size == 2 * block.tuned_experts


# ---------------------------------------------------------------------- what does not fit


def test_advice_makes_it_fit():
    config = configuration(SHORT_LLAMA)
    machine = find_machine("5GB", "100GB", "1TB")
    found = plan(config, "w2a16_autoround", machine=machine)
    assert [x.resource for x in found.shortages] == ["device memory"]
    assert "batch_size 4 with gradient_accumulate_steps 2" in [x.text for x in found.advice]
    names = {"samples": "num_calibration_samples"}
    for change in found.advice:
        fields = {names.get(key, key): value for key, value in change.settings.items()}
        length = fields.pop("length", None)
        again = plan(config, "w2a16_autoround", machine=machine, max_seq_length=length, **fields)
        assert again.fits, change.text
    assert "rtx4090" in found.fitting_devices


def test_advice_combines_what_does_not_suffice_alone():
    machine = find_machine("4GB", "8GB", "1TB")
    found = plan(configuration(LLAMA_3_1_8B), machine=machine)
    (change,) = found.advice
    assert change.settings["model_on_disk"]
    assert len(change.settings) > 1
    assert "; " in change.text


def test_a_smaller_scheme_is_named_where_the_disk_is_small():
    machine = find_machine("h100", "100GB", "5.4GB")
    config = configuration(SHORT_LLAMA)
    found = plan(config, scheme="W8A16", machine=machine)
    assert [x.resource for x in found.shortages] == ["disk"]
    (change,) = found.advice
    scheme = change.text.removeprefix("scheme ")
    assert plan(config, scheme=scheme, machine=machine).fits


def test_nothing_helps_where_the_original_is_too_large():
    found = plan(configuration(SHORT_LLAMA), machine=find_machine("h100", "100GB", "2GB"))
    assert not found.fits
    assert found.advice == ()
    assert "with the model on the disk it would lack disk" in found.notes[-1]


def test_what_a_run_would_refuse_is_refused(tmp_path):
    config = configuration({**SHORT_LLAMA, "intermediate_size": 14000})
    with pytest.raises(SchemeError, match="group_size does not divide"):
        plan(config, scheme="W4A16")
    with pytest.raises(RecipeError, match="cannot read its config"):
        plan(folder_of(tmp_path / "unknown", {"model_type": "no_such_model"}))
    quantized = {**SHORT_LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(CompressedSourceError, match="gptq"):
        plan(folder_of(tmp_path / "gptq", quantized))
    with pytest.raises(RecipeError, match="no AutoRoundModifier"):
        plan(configuration(SHORT_LLAMA), [ScaleDistillationModifier()])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="config"):
        plan(tmp_path / "empty")


# ---------------------------------------------------------------------- hardware


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("64 GiB", 64 * 2**30), ("80", 80e9), ("1.5T", 1.5e12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_devices():
    assert find_device("NVIDIA H100") == DEVICES["h100"]
    assert find_device("24GB").memory == 24e9
    assert find_device("24GB").flops is None
    assert find_device("cpu").is_cpu
    assert find_device("cpu").flops > 1e8
    with pytest.raises(ValueError, match="no known device"):
        find_device("h9000")
    with pytest.raises(ValueError, match="no size"):
        parse_size("a lot")


def test_a_cpu_holds_all_in_host_memory():
    found = plan(configuration(SHORT_LLAMA), machine=find_machine("cpu", "64GB", "1TB"))
    assert set(found.peak.parts) <= set(found.host)
    assert not any("weights of the block" in part.name for part in found.host)
    assert found.machine.device.kind == "measured"


# ---------------------------------------------------------------------- command line


def test_the_command_prints_tables(tmp_path, capsys):
    folder = folder_of(tmp_path / "model", SHORT_LLAMA)
    arguments = ["plan", folder, "--gpu", "h100", "--ram", "64GB", "--disk", "1TB"]
    assert main([*arguments, "--recipe", "w2a16_autoround"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"device memory at the peak \(tuning model.layers.0\)", out)
    assert re.search(r"saved for the backward pass +3\.63 GB +counted", out)
    assert "fits: h100" in out


def test_the_command_refuses_and_advises(tmp_path, capsys):
    folder = folder_of(tmp_path / "model", SHORT_LLAMA)
    arguments = ["plan", folder, "--gpu", "4GB", "--ram", "64GB", "--disk", "1TB"]
    assert main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert found["device"]["bytes"] > found["machine"]["device_memory"]
    change = next(x for x in found["advice"] if "gradient_accumulate_steps" in x["settings"])
    flags = [
        text
        for name, value in change["settings"].items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    assert main([*arguments, *flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_wrong_usage(tmp_path, capsys):
    folder = str(tiny_llama_folder(torch.bfloat16, 2, 0, False))
    assert main(["plan", folder, "--gpu", "h9000"]) == 2
    assert main(["plan", folder, "--recipe", "w4a16_autoround", "--scheme", "W4A16"]) == 2
    assert main(["plan", folder, "--ram", "much"]) == 2
    assert main(["plan", folder, "--scheme", "W4A16G64", "--preset", "fast"]) == 1
    assert "unknown preset" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "nowhere")]) == 1


def test_a_revision_of_the_hub_is_planned(tmp_path, monkeypatch, capsys):
    """What `quantize --revision` would load, in the cache of the Hub."""
    cache = tmp_path / "models--some--model"
    for name, layers in (("main", 2), ("wide", 3)):
        commit = name[0] * 40
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / name).write_text(commit)
        (cache / "snapshots").mkdir(exist_ok=True)
        folder_of(cache / "snapshots" / commit, {**LLAMA_3_1_8B, "num_hidden_layers": layers})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    newest, wide = (
        plan("some/model", machine=LARGE, revision=revision) for revision in (None, "wide")
    )
    block = wide.counts.parameters - newest.counts.parameters
    assert block == pytest.approx(218_112_000, rel=0.01)  # of Llama 3.1 8B
    machine = ["--gpu", "b200", "--ram", "10TB", "--disk", "10TB"]
    assert main(["plan", "some/model", "--revision", "wide", *machine, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == wide.counts.parameters
