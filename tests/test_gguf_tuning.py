"""Models tuned in types of GGUF: what is tuned, saved, resumed and refused."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from conftest import quantize, tiny_llama, tiny_llama_folder
from helpers import quantized_layers, saved_tensors
from llmcompressor.core import reset_session
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from autoround_modifier import (
    AutoRoundModifier,
    ScaleDistillationModifier,
    inspect_checkpoint,
    load_recipe,
    plan,
)
from autoround_modifier.checkpoints.gguf_blocks import (
    BLOCKS_FILE,
    SavedBlocks,
    find_blocks_file,
    write_gguf_blocks,
)
from autoround_modifier.cli.main import main
from autoround_modifier.engines.hardware import Hardware
from autoround_modifier.errors import CheckpointError, RecipeError, SchemeError
from autoround_modifier.gguf_schemes import GGUF_TYPES, ModelFacts, fitting_type, layer_types
from autoround_modifier.modifiers.layer_quantizer import LayerQuantizer
from autoround_modifier.report.card import CardOptions, make_card
from autoround_modifier.report.schema import read_report
from autoround_modifier.runs.checkpoint import RunCheckpoint

FAST = {"iters": 2, "batch_size": 4, "ignore": ["lm_head"]}


def tuner(scheme: str, **fields) -> AutoRoundModifier:
    return AutoRoundModifier(scheme=scheme, **{**FAST, **fields})


def weights_of_blocks(folder) -> dict[str, torch.Tensor]:
    """Layer -> its weight as somebody else's code reads the blocks, float32."""
    saved = SavedBlocks(folder)
    return {
        name: torch.from_numpy(
            gguf.quants.dequantize(
                saved.blocks(name).numpy(), gguf.GGMLQuantizationType[kind.upper()]
            )
        )
        for name, kind in saved.types.items()
    }


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("gguf:q2_k", torch.bfloat16),
        ("gguf:q3_k_m", torch.float16),
        ("GGUF:Q4_K_M", torch.float32),
        ("gguf:q6_k", torch.bfloat16),
    ],
)
def test_saved_weights_are_those_of_the_blocks(scheme, dtype, tmp_path, log):
    model = tiny_llama(dtype, hidden_size=256)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model = quantize(model, tuner(scheme), output_dir=tmp_path / "out")
    found = weights_of_blocks(tmp_path / "out")
    assert len(found) == 14
    tensors = saved_tensors(tmp_path / "out")
    in_memory = dict(model.named_parameters())
    for name, weight in found.items():
        assert torch.equal(tensors[f"{name}.weight"], weight.to(dtype)), name
        assert torch.equal(in_memory[f"{name}.weight"], weight.to(dtype)), name
        assert not torch.equal(tensors[f"{name}.weight"], before[f"{name}.weight"])
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") not in found:
            assert torch.equal(tensor, before[name]), name
    assert not quantized_layers(model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    ids = torch.arange(3, 20).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not [line for line in log if line.startswith("ERROR")]


@pytest.mark.parametrize("scheme", ["gguf:q2_k", "gguf:q4_k_m"])
def test_iters_0_searches_the_double_quantized_scales(scheme, tmp_path):
    """The squared error of the weights is less than that of rounding to nearest."""
    errors = {}
    for preset in ("rtn", "opt_rtn"):
        model = tiny_llama(torch.float32, hidden_size=256, num_layers=1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        modifier = AutoRoundModifier(scheme=scheme, preset=preset, ignore=["lm_head"])
        quantize(model, modifier, output_dir=tmp_path / preset)
        reset_session()
        found = weights_of_blocks(tmp_path / preset)
        errors[preset] = sum(
            float((weight - before[f"{name}.weight"]).square().sum())
            for name, weight in found.items()
        )
    assert errors["opt_rtn"] < {"gguf:q2_k": 0.7, "gguf:q4_k_m": 0.95}[scheme] * errors["rtn"]


# ------------------------------------------------------------------------------- fallback


def test_rows_that_super_blocks_do_not_fit_are_tuned_in_the_fallback(tmp_path, log):
    model = tiny_llama(hidden_size=64)  # input features: 64 and 128
    quantize(model, tuner("gguf:q4_k_m"), output_dir=tmp_path / "out")
    saved = SavedBlocks(tmp_path / "out")
    assert saved.scheme == "gguf:q4_k_m"
    assert set(saved.types.values()) == {"q5_0", "q8_0"}
    assert saved.types["model.layers.0.mlp.gate_proj"] == "q5_0"
    assert saved.types["model.layers.1.mlp.down_proj"] == "q8_0"
    tensors = saved_tensors(tmp_path / "out")
    for name, weight in weights_of_blocks(tmp_path / "out").items():
        assert torch.equal(tensors[f"{name}.weight"], weight.to(torch.bfloat16)), name
    (said,) = (line for line in log if "smaller blocks" in line)
    assert "12 layers of 64 or 128 input features in Q5_0 (model.layers.0.self_attn.q" in said
    assert "2 layers of 64 or 128 input features in Q8_0 (model.layers.1.self_attn.v_proj" in said


def test_fallback_types():
    for name, kind in {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q6_k": "q8_0"}.items():
        assert fitting_type(name, 512) == name
        assert fitting_type(name, 640) == kind
        assert fitting_type(name, 650) is None
    assert fitting_type("q5_k", 96) == "q5_0"  # llama.cpp: Q5_1


# ------------------------------------------------------------------------------- mixtures


def llama_layers(count: int) -> list[str]:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return [f"model.layers.{i}.{kind}" for i in range(count) for kind in kinds]


def types_of(scheme: str, count: int, leaf: str, **facts) -> str:
    """One digit for each block: the bits of its layer of that name."""
    found = layer_types(scheme, llama_layers(count), ModelFacts(**facts))
    return "".join(kind[1] for name, kind in found.items() if name.endswith(leaf))


def test_mixtures_are_those_of_llama_cpp():
    """`llama_tensor_get_type_impl` at commit 007dbbf3, worked out by hand for 16 and 32 blocks."""
    more = "6644644644644666"  # 0, 1; 2 + 2 mod 3; 14, 15
    assert types_of("gguf:q4_k_m", 16, "v_proj") == more
    assert types_of("gguf:q4_k_m", 16, "down_proj") == more
    assert types_of("gguf:q4_k_m", 32, "down_proj") == "66664464464464464464464464466666"
    for leaf in ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj"):
        assert types_of("gguf:q4_k_m", 16, leaf) == 16 * "4"
    assert types_of("gguf:q4_k_m", 2, "v_proj") == "46"
    assert types_of("gguf:q3_k_m", 32, "v_proj") == "55" + 30 * "4"
    assert types_of("gguf:q3_k_m", 32, "down_proj") == "55" + 30 * "4"
    assert types_of("gguf:q3_k_m", 15, "down_proj") == 15 * "4"
    assert types_of("gguf:q3_k_m", 32, "o_proj") == 32 * "4"
    assert types_of("gguf:q3_k_m", 32, "q_proj") == 32 * "3"
    assert types_of("gguf:q2_k_s", 16, "down_proj") == "44" + 14 * "2"
    assert types_of("gguf:q2_k_s", 16, "v_proj") == 16 * "2"
    assert types_of("gguf:q2_k_s", 16, "v_proj", queries_per_key=4) == 16 * "4"
    assert types_of("gguf:q2_k_s", 16, "o_proj") == 16 * "2"
    of_70b = types_of("gguf:q4_k_m", 16, "v_proj", queries_per_key=8, is_70b=True)
    assert of_70b == more.replace("4", "5")
    for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"):
        assert set(layer_types(f"gguf:{name}", llama_layers(4), ModelFacts()).values()) == {name}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.qkv_proj", "q6_k"),
        ("transformer.h.0.self_attention.query_key_value", "q6_k"),
        ("model.layers.0.mlp.fc2", "q6_k"),
        ("model.layers.0.mlp.c_proj", "q6_k"),
        ("model.layers.0.attn.c_proj", "q4_k"),
        ("model.layers.0.self_attn.dense", "q4_k"),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h", "q6_k"),
    ],
)
def test_layers_of_other_models_have_their_parts(name, kind):
    assert layer_types("gguf:q4_k_m", [name], ModelFacts()) == {name: kind}


def test_ignored_layers_count_in_a_mixture(tmp_path):
    model = tiny_llama(hidden_size=256, num_layers=3)
    ignore = ["lm_head", "model.layers.0.mlp.down_proj"]
    quantize(model, tuner("gguf:q4_k_m", iters=0, ignore=ignore), output_dir=tmp_path / "out")
    saved = SavedBlocks(tmp_path / "out")
    assert len(saved.types) == 20
    assert [saved.types[f"model.layers.{i}.mlp.down_proj"] for i in (1, 2)] == ["q4_k", "q6_k"]


def test_carriers_tell_types_apart():
    kinds = [tuple(kind.carrier().values()) for kind in GGUF_TYPES.values()]
    assert len(set(kinds)) == len(kinds)
    for name, kind in GGUF_TYPES.items():
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
        assert size == (kind.block, kind.block_bytes)


# ------------------------------------------------------------------------------- resuming


def test_resumes_with_the_same_blocks(tmp_path, monkeypatch):
    def run(output, **fields):
        model = tiny_llama(hidden_size=256)
        return quantize(model, tuner("gguf:q3_k_m", **fields), output_dir=tmp_path / output)

    run("whole")
    kept = {"checkpoint_dir": str(tmp_path / "kept")}
    save = RunCheckpoint.save

    def stop_at_the_second(self, index, *args, **kwargs):
        if index == 1:
            raise KeyboardInterrupt
        return save(self, index, *args, **kwargs)

    monkeypatch.setattr(RunCheckpoint, "save", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", **kept)
    monkeypatch.setattr(RunCheckpoint, "save", save)
    reset_session()
    run("resumed", **kept)
    whole, resumed = (SavedBlocks(tmp_path / x) for x in ("whole", "resumed"))
    assert whole.types == resumed.types
    assert set(whole.types.values()) == {"q3_k", "q4_k", "q5_k"}
    for name in whole.types:
        assert torch.equal(whole.blocks(name), resumed.blocks(name)), name


def test_a_stopped_run_leaves_no_carriers(monkeypatch):
    """What was tuned until then computes as it would be saved, and is known as quantized."""
    model = tiny_llama(hidden_size=256)
    ids = torch.arange(3, 20).unsqueeze(0)

    write_back = LayerQuantizer.write_back

    def stop_in_the_second_block(self, layer, weight):
        if "layers.1" in self.names[layer]:
            raise KeyboardInterrupt
        write_back(self, layer, weight)

    monkeypatch.setattr(LayerQuantizer, "write_back", stop_in_the_second_block)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tuner("gguf:q4_k"))
    assert not quantized_layers(model)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert model(ids).logits.isfinite().all()
    monkeypatch.undo()
    reset_session()
    with pytest.raises(RecipeError, match=r"quantized already.*layers\.0"):
        quantize(model, tuner("gguf:q4_k"))


# ------------------------------------------------------------------------------- refusals

REFUSED = {
    "other modifier": (
        lambda: [
            tuner("gguf:q4_k", ignore=["lm_head", "re:.*mlp.*"]),
            AutoRoundModifier(scheme="W4A16", targets=["re:.*mlp.*"], iters=0),
        ],
        "nothing else can be quantized: remove AutoRoundModifier",
    ),
    "distillation": (
        lambda: [tuner("gguf:q4_k"), ScaleDistillationModifier()],
        "remove ScaleDistillationModifier",
    ),
    "head": (lambda: tuner("gguf:q4_k", ignore=[]), "add them to `ignore`. outside of the decoder"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_runs(make, message, monkeypatch):
    model = tiny_llama(hidden_size=256)
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises((RecipeError, SchemeError), match=message):
        quantize(model, make())
    reset_session()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "gguf:q7_k"}, "unknown scheme `gguf:q7_k`.*gguf:q2_k_s"),
        ({"scheme": {"gguf:q4_k": ["Linear"]}}, "write `scheme: gguf:q4_k`"),
        ({"scheme": "gguf:q4_k", "config_groups": {}}, "exclude each other"),
        ({"scheme": "gguf:q4_k", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "no quant"),
    ],
)
def test_fields_that_exclude_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        AutoRoundModifier(**fields)


def test_rows_of_no_whole_blocks_are_refused():
    model = tiny_llama(hidden_size=48)
    with pytest.raises(SchemeError, match="48 input features, no multiple of 32"):
        quantize(model, tuner("gguf:q4_k", iters=0))


def test_a_tuned_model_is_not_quantized_again():
    model = quantize(tiny_llama(hidden_size=256), tuner("gguf:q6_k", iters=0))
    reset_session()
    with pytest.raises(RecipeError, match="quantized already"):
        quantize(model, tuner("gguf:q4_k"))


def test_a_modifier_is_used_for_another_model():
    """Names of layers of the first one are forgotten."""
    modifier = tuner("gguf:q4_k", iters=0)
    modifier.set_gguf_types({"model.layers.7.mlp.up_proj": "q4_k"})
    quantize(tiny_llama(hidden_size=256), modifier)


# ------------------------------------------------------------------------------- what is said


def test_report_inspection_and_plan(tmp_path, capsys):
    out = tmp_path / "out"
    quantize(tiny_llama(hidden_size=256), tuner("gguf:q4_k_m"), output_dir=out)
    report = read_report(out)
    labels = {layer.name: (layer.scheme, layer.bits_per_weight) for layer in report.layers}
    assert labels["model.layers.0.mlp.up_proj"] == ("GGUF Q4_K", 4.5)
    assert labels["model.layers.1.mlp.down_proj"] == ("GGUF Q6_K", 6.5625)
    assert len(labels) == 14
    assert all(layer.error is not None for layer in report.layers)
    assert report.unquantized == ["model.embed_tokens", "lm_head"]
    found = inspect_checkpoint(out)
    assert found.contents.format == (
        "gguf:q4_k_m: blocks of GGUF of 14 layers, Q4_K (12), Q6_K (2)"
    )
    assert found.contents.gguf_types == {"q4_k": 12, "q6_k": 2}
    assert found.loads("any")
    supports = {x.engine: x for x in inspect_checkpoint(out, "cpu").here}
    (choice,) = supports["llama.cpp"].kernels[Hardware("cpu")]
    assert (choice.kernel, choice.export) == ("ggml Q4_K_M, CPU", "gguf:q4_k_m")
    assert supports["Transformers"].loads_on(Hardware("cpu"))
    assert not supports["MLX"].loads
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "blocks of GGUF of 14 layers" in text
    assert "gguf:q4_k_m FILE.gguf` writes a file for llama.cpp" in text
    card = make_card(out, CardOptions()).text
    assert "tuned in types of GGUF (`gguf:q4_k_m`)" in card
    assert "GGUF Q4_K; GGUF Q6_K" in card
    recipe = load_recipe(out / "recipe.yaml")
    assert recipe.modifiers[0].gguf_scheme == "gguf:q4_k_m"
    planned = plan(tiny_llama(hidden_size=256).config, scheme="gguf:q4_k_m", iters=2)
    saved = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert planned.checkpoint.value == pytest.approx(saved, rel=0.02)


def test_blocks_of_an_earlier_checkpoint_go(tmp_path):
    out = tmp_path / "out"
    quantize(tiny_llama(hidden_size=256), tuner("gguf:q6_k", iters=0), output_dir=out)
    assert (out / BLOCKS_FILE).is_file()
    reset_session()
    other = AutoRoundModifier(scheme="W4A16", iters=0, ignore=["lm_head"])
    model = tiny_llama(hidden_size=256)
    quantize(model, other, output_dir=out, overwrite_output_dir=True)
    assert find_blocks_file(out) is None
    assert inspect_checkpoint(out).contents.format.startswith("compressed-tensors")


def test_a_damaged_file_of_blocks_is_named(tmp_path):
    (tmp_path / BLOCKS_FILE).parent.mkdir()
    save_file({"a": torch.zeros(2, 18, dtype=torch.uint8)}, tmp_path / BLOCKS_FILE)
    with pytest.raises(CheckpointError, match="does not say in which types"):
        SavedBlocks(tmp_path)
    write_gguf_blocks(tmp_path, "gguf:q4_k", {"b": "q4_0"}, {"a": torch.zeros(2, 18)})
    with pytest.raises(CheckpointError, match="not known here: a, b"):
        SavedBlocks(tmp_path)


def test_by_the_command_line(capsys):
    assert main(["schemes", "gguf:q4_k_m"]) == 0
    text = capsys.readouterr().out
    assert "Q4_K_M of llama.cpp, with quantized scales" in text
    assert "bits per weight   4.500" in text
    assert "  scheme: gguf:q4_k_m" in text
    assert "gguf_q4_k_m_autoround" in text
    folder = str(tiny_llama_folder(torch.bfloat16, 2, 0, False, 256))
    assert main(["quantize", folder, "--scheme", "gguf:q2_k_s", "--dry-run"]) == 0
    assert "scheme: gguf:q2_k_s" in capsys.readouterr().out
