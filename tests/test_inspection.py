"""Which engine is recommended for a checkpoint, with which commands, and what memory that takes."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import quantize, tiny_llama, tiny_llama_folder, weight_scheme
from llmcompressor.core import reset_session
from transformers import AutoConfig, AutoModelForCausalLM
from typer.main import get_command

from autoround_modifier import AutoRoundModifier, inspect_checkpoint
from autoround_modifier.cli.main import app, main
from autoround_modifier.engines import environment
from autoround_modifier.engines.hardware import DEVICES, Hardware, device_named
from autoround_modifier.engines.layers import ShapedLayer, alike_layers, fused_layers
from autoround_modifier.engines.scheme import Scheme
from autoround_modifier.inspection.exportable import export_problems
from autoround_modifier.inspection.memory import cache_size
from autoround_modifier.inspection.supports import supports_of_layers


def integers(bits: int, group_size: int = 64, symmetric: bool = True) -> Scheme:
    strategy = "channel" if group_size == -1 else "group"
    return Scheme("int", bits, symmetric, group_size, strategy, format="pack-quantized")


def llama_layers(scheme: Scheme, hidden: int = 4096, mlp: int = 14336) -> list[ShapedLayer]:
    """:return: those of a block of Llama-3.1-8B, or of a smaller one, with a quarter of kv heads"""
    shapes = {"q_proj": (hidden, hidden), "k_proj": (hidden // 4, hidden)}
    shapes |= {"v_proj": (hidden // 4, hidden), "o_proj": (hidden, hidden)}
    attention = {f"model.layers.0.self_attn.{name}": shape for name, shape in shapes.items()}
    shapes = {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    found = attention | {f"model.layers.0.mlp.{name}": shape for name, shape in shapes.items()}
    return [ShapedLayer(name, scheme, *shape) for name, shape in found.items()]


def kernels(layers: list[ShapedLayer], device: str, engine: str, **options) -> list[str | None]:
    """:return: of an engine, each once"""
    hardware = device_named(device)
    supports = supports_of_layers(layers, "M", (hardware,), **options)
    (support,) = (x for x in supports if x.engine == engine)
    return sorted({choice.kernel for choice in support.kernels[hardware]}, key=str)


@pytest.fixture(scope="module")
def w2(tmp_path_factory) -> Path:
    """2 bits, symmetric, groups of 64: llama.cpp's Q2_0."""
    folder = tmp_path_factory.mktemp("w2") / "model of mine"
    recipe = AutoRoundModifier(
        preset="rtn", ignore=["lm_head"], config_groups={"a": weight_scheme(2, group_size=64)}
    )
    quantize(tiny_llama(), recipe, output_dir=folder)
    reset_session()
    return folder


# ------------------------------------------------------------------------- shapes


def test_engines_that_fuse_see_the_features_of_all_parts():
    layers = llama_layers(integers(4))
    fused = {layer.name: layer.out_features for layer in fused_layers(layers)}
    assert fused["model.layers.0.self_attn.qkv_proj"] == 4096 + 2 * 1024
    assert fused["model.layers.0.mlp.gate_up_proj"] == 2 * 14336
    assert len(fused) == 4
    assert sum(x.out_features for x in layers) == sum(fused.values())
    (alike, *_) = alike_layers(layers)
    assert (alike.shape, alike.number) == ((1024, 4096), 2)


def test_parts_of_several_schemes_are_not_fused():
    layers = llama_layers(integers(4))
    layers[0] = ShapedLayer(layers[0].name, integers(2), 4096, 4096)
    assert layers[0] in fused_layers(layers)


def test_a_layer_that_machete_does_not_take_gets_another_kernel():
    """4096 + 2 * 1024 features are a multiple of 128; of 576 + 2 * 144 only the MLP's are."""
    assert kernels(llama_layers(integers(4)), "sm90", "vLLM") == ["Machete"]
    small = llama_layers(integers(4), hidden=576, mlp=1536)
    assert kernels(small, "sm90", "vLLM") == ["Humming", "Machete"]
    assert kernels(small, "sm80", "vLLM") == ["Marlin"]
    hardware = device_named("sm90")
    vllm, *_ = supports_of_layers(small, "M", (hardware,))
    by_kernel = {x.kernel: x.layers_text for x in vllm.kernels[hardware]}
    assert by_kernel["Machete"] == "W4A16 G64 (gate_up_proj)"


def test_a_shape_that_no_kernel_takes_is_the_reason():
    layers = [ShapedLayer("model.layers.0.mlp.down_proj", integers(4), 36, 768)]
    hardware = device_named("cpu")
    vllm, *_ = supports_of_layers(layers, "M", (hardware,))
    assert vllm.reasons_on(hardware) == (
        "W4A16 G64: CPUWNA16 needs output features in multiples of 32 and input features in "
        "multiples of 32, and a layer has 36 x 768",
    )


# ------------------------------------------------------------------------- exports


@pytest.mark.parametrize(
    ("scheme", "device", "engine", "kernel"),
    [
        (integers(2), "metal", "llama.cpp", "ggml Q2_0, Metal"),
        (integers(2), "metal", "MLX", "quantized_matmul, Metal"),
        (integers(2, symmetric=False), "cpu", "llama.cpp", "ggml Q4_0, CPU"),
        (integers(4, symmetric=False), "sm89", "llama.cpp", "ggml Q5_0, CUDA"),
        (integers(8), "rocm", "llama.cpp", "ggml Q8_0, CUDA"),
        (integers(2), "sm80", "GPTQModel", "TritonV2"),
        (integers(3), "sm80", "GPTQModel", "Torch"),
        (integers(4), "sm80", "GPTQModel", "Marlin"),
        (integers(4), "sm90", "GPTQModel", "Machete"),
        (integers(4), "sm100", "GPTQModel", "Swordfish"),
        (integers(4, symmetric=False), "sm80", "GPTQModel", "ExLlamaV2"),
        (integers(4), "cpu", "GPTQModel", "TorchCpuAvx512"),
        (integers(4, -1), "cpu", "GPTQModel", None),
        (integers(8), "cpu", "GPTQModel", "Torch"),
        (integers(2), "cpu", "auto-round", "auto_round_kernel"),
        (integers(3), "cpu", "auto-round", "auto_round:torch"),
        (integers(8), "sm80", "auto-round", "gptqmodel:marlin"),
        (integers(3), "sm80", "auto-round", "auto_round:humming"),
        (integers(4), "cpu", "OpenVINO", "ct_gemm, CPU"),
        (integers(4, -1), "cpu", "OpenVINO", None),
    ],
    ids=lambda x: x.label if isinstance(x, Scheme) else None,
)
def test_kernels_of_engines_beside_vllm(scheme, device, engine, kernel):
    assert kernels(llama_layers(scheme), device, engine, dtype="bfloat16") == [kernel]


def test_what_cannot_be_exported_is_refused_with_the_exporters_reason():
    problems = export_problems(llama_layers(integers(4, 256)), [], False)
    assert problems["gptq"] is None
    assert problems["mlx"] == "W4A16 G256: it holds groups of 32, 64 or 128"
    problems = export_problems(llama_layers(integers(2, symmetric=False)), [], False)
    assert problems["gguf:q2_0"] is not None
    assert problems["gguf:q4_0"] is None
    assert all(export_problems(llama_layers(integers(4)), [], True).values())
    fp8 = Scheme("fp8", 8, True, -1, "channel", numbers="FP", input_bits=8, input_numbers="FP")
    problems = export_problems(llama_layers(fp8), [], False)
    assert set(problems.values()) == {
        "integers of weights alone are exported, not FP8 channel dynamic"
    }
    hardware = device_named("metal")
    mlx = next(
        x for x in supports_of_layers(llama_layers(fp8), "M", (hardware,)) if x.engine == "MLX"
    )
    assert mlx.reasons_on(hardware) == (f"FP8 channel dynamic: {problems['mlx']}",)


def test_reasons_of_several_formats_are_said_once_each():
    name = "model.layers.0.mlp.experts.0.down_proj"
    hardware, expert = device_named("metal"), ShapedLayer(name, integers(5), 512, 512, True)
    supports = {x.engine: x for x in supports_of_layers([expert], "M", (hardware,))}
    (reason,) = supports["GPTQModel"].reasons_on(hardware)
    assert reason.count("experts of a mixture are exported to") == 2
    assert reason.startswith("W5A16 G64: gptq: ")
    assert "; awq: " in reason


# ------------------------------------------------------------------------- the best choice


@pytest.mark.parametrize(
    ("device", "first"),
    [
        ("sm75", "vLLM"),
        ("sm120", "vLLM"),
        ("metal", "MLX"),
        ("cpu", "llama.cpp"),
        ("rocm", "llama.cpp"),
    ],
)
def test_packed_weights_come_before_weights_in_16_bits(w2, device, first):
    inspection = inspect_checkpoint(w2, device)
    engines = [support.engine for support in inspection.choices]
    assert engines[0] == first
    assert engines[-1] == "Transformers"
    refusing = {x.engine for x in inspection.here} - set(engines)
    assert {"TensorRT-LLM", "OpenVINO"} <= refusing


@pytest.mark.parametrize("device", DEVICES)
def test_commands_are_what_the_command_line_takes(w2, device):
    """Names with spaces are quoted; each export is one that `export` knows."""
    inspection = inspect_checkpoint(w2, device)
    export = get_command(app).commands["export"]
    for support in inspection.choices:
        serving = support.serving[inspection.device]
        format = support.export_on(inspection.device)
        assert bool(serving.export) == bool(format)
        if not format:
            assert str(w2) in serving.command
            continue
        program, command, *arguments = shlex.split(serving.export)
        assert (program, command) == ("autoround-modifier", "export")
        parsed = export.make_context("export", arguments).params
        assert parsed["checkpoint"] == w2
        assert parsed["format"] == format
        output = str(parsed["output"])
        assert output.endswith(".gguf") == format.startswith("gguf:")
        if serving.command.startswith(("llama-cli", "mlx_lm")):
            assert output in shlex.split(serving.command)
        else:
            assert repr(output) in serving.command
            compile(serving.command, support.engine, "exec")


def test_a_package_that_is_missing_is_named(w2, monkeypatch):
    versions = {("auto-round",): "0.16.1", ("transformers",): "5.17.0"}
    monkeypatch.setattr(environment, "_accelerator", lambda: (Hardware("cpu"), "CPU"))
    monkeypatch.setattr(environment, "_version", versions.get)
    inspection = inspect_checkpoint(w2)
    (support,) = (x for x in inspection.choices if x.engine == "auto-round")
    (choice,) = support.kernels[Hardware("cpu")]
    assert (choice.kernel, choice.better) == ("auto_round:torch", "auto_round_kernel")
    assert choice.better_package == "auto-round-lib"
    versions["auto-round-lib",] = "0.16.0"
    (support,) = (x for x in inspect_checkpoint(w2).choices if x.engine == "auto-round")
    assert support.kernels[Hardware("cpu")][0].kernel == "auto_round_kernel"


def test_an_unquantized_checkpoint_runs_where_engines_run():
    inspection = inspect_checkpoint(tiny_llama_folder(torch.bfloat16, 2, 0, False), "metal")
    assert [x.engine for x in inspection.choices] == ["Transformers"]
    inspection = inspect_checkpoint(tiny_llama_folder(torch.bfloat16, 2, 0, False), "sm90")
    assert inspection.choices[0].engine == "vLLM"


# ------------------------------------------------------------------------- memory


def config(model_type: str, **fields):
    return AutoConfig.for_model(model_type, **fields)


@pytest.mark.parametrize(
    ("model", "numbers"),
    [
        # Llama-3.1-8B: 131,072 bytes a token in 16 bits
        (
            {"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "hidden_size": 4096},
            8192 * 32 * 2 * 8 * 128,
        ),
        # Gemma 3 1B: 22 layers of 26 with a window of 512
        (
            {"model_type": "gemma3_text", "num_hidden_layers": 26, "num_attention_heads": 4,
             "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512},
            (22 * 512 + 4 * 8192) * 2 * 256,
        ),
        # Mistral 7B v0.1: a window of 4096 in all layers
        (
            {"model_type": "mistral", "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "hidden_size": 4096, "sliding_window": 4096},
            4096 * 32 * 2 * 8 * 128,
        ),
        # DeepSeek-V3: 512 latent and 64 rotary numbers a token in each layer
        ({"model_type": "deepseek_v3", "num_hidden_layers": 61}, 8192 * 61 * (512 + 64)),
        # Falcon-7B: all heads share keys and values
        (
            {"model_type": "falcon", "num_hidden_layers": 32, "num_attention_heads": 71,
             "hidden_size": 4544, "multi_query": True},
            8192 * 32 * 2 * 64,
        ),
    ],
    ids=lambda x: x["model_type"] if isinstance(x, dict) else None,
)  # fmt: skip
def test_the_cache_is_what_can_be_computed_by_hand(model, numbers):
    assert cache_size(config(**model), 8192).numbers == numbers


@pytest.mark.parametrize(
    "model_type", ["t5", "mamba", "falcon_h1", "gemma4_text", "mllama_text_model"]
)
def test_a_cache_that_is_not_known_is_said(model_type):
    size = cache_size(config(model_type), 8192)
    assert size.numbers is None
    assert size.notes[0].startswith("the key-value cache is not known: ")


def test_recurrent_layers_have_no_keys_and_values():
    size = cache_size(config("qwen3_next"), 100)
    assert size.numbers == 12 * 100 * 2 * 2 * 256
    assert size.layers == "36 layers without, 12 layers, 2 heads of 256"
    assert size.notes == ("the states of its recurrent layers are not counted",)


@pytest.mark.parametrize(
    "model",
    [
        config("llama", num_hidden_layers=3, hidden_size=64, intermediate_size=64, vocab_size=64,
               num_attention_heads=4, num_key_value_heads=2),
        config("deepseek_v3", num_hidden_layers=2, hidden_size=64, intermediate_size=64,
               vocab_size=64, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16,
               q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=24,
               first_k_dense_replace=2),
    ],
    ids=lambda x: x.model_type,
)  # fmt: skip
def test_transformers_caches_as_many_numbers(model):
    loaded = AutoModelForCausalLM.from_config(model)
    cache = loaded(torch.arange(10)[None], use_cache=True).past_key_values
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cache_size(model, 10).numbers == numbers


def test_memory_of_weights_and_cache(w2):
    inspection = inspect_checkpoint(w2, "sm90", context_length=100, sequences=3)
    memory, contents = inspection.memory, inspection.contents
    saved = sum(kind.bytes for kind in contents.kinds)
    assert memory.packed == saved
    quantized = [kind for kind in contents.kinds if kind.quantized]
    weights = sum(kind.weights for kind in quantized)
    unpacked = saved - sum(kind.bytes for kind in quantized) + 2 * weights
    assert memory.unpacked == unpacked
    raw = json.loads((w2 / "config.json").read_text())
    head = raw["hidden_size"] // raw["num_attention_heads"]
    numbers = 100 * raw["num_hidden_layers"] * 2 * raw["num_key_value_heads"] * head
    assert memory.cache == memory.cache_in_16_bits == 3 * 2 * numbers
    by_engine = {x.engine: memory.weights_of(x, inspection.device) for x in inspection.choices}
    assert by_engine["vLLM"] == saved
    assert by_engine["Transformers"] == unpacked
    in_gguf = saved - sum(kind.bytes for kind in quantized) + weights * 2.25 / 8
    assert by_engine["llama.cpp"] == in_gguf


def test_a_cache_in_fp8_takes_half(w2, tmp_path):
    shutil.copytree(w2, tmp_path / "kv")
    path = tmp_path / "kv" / "config.json"
    changed = json.loads(path.read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    changed["quantization_config"]["kv_cache_scheme"] = scheme
    path.write_text(json.dumps(changed))
    memory = inspect_checkpoint(tmp_path / "kv").memory
    assert memory.cache is not None
    assert memory.cache_in_16_bits == 2 * memory.cache


# ------------------------------------------------------------------------- the command


def test_inspect_names_the_best_choice_for_a_device(w2, capsys):
    assert main(["inspect", str(w2), "--device", "metal"]) == 0
    text = capsys.readouterr().out
    assert "On another machine (Apple GPU), the best choice first:" in text
    best = text[text.index("Best choice: ") :].splitlines()
    assert best[0].startswith("Best choice: MLX, ")
    assert best[1] == "  pip install mlx-lm"
    assert best[2] == f"  autoround-modifier export '{w2}' mlx '{w2}-mlx'"
    assert best[3] == f"  mlx_lm.generate --model '{w2}-mlx' --prompt Hello"
    assert "which unpacks quantized weights to 16 bits" in text
    assert "Elsewhere" not in text


def test_inspect_as_json_has_choices_and_memory(w2, capsys):
    arguments = ["inspect", str(w2), "--device", "sm90", "--json", "--context-length", "64"]
    assert main([*arguments, "--sequences", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["device"] == "NVIDIA 9.0"
    assert document["memory"]["context_length"] == 64
    first, *_ = document["choices"]
    assert first["engine"] == "vLLM"
    assert shlex.split(first["command"]) == ["vllm", "serve", str(w2)]
    assert first["kernels"][0]["kernel"] == "Humming"
    assert first["kernels"][0]["source"].endswith("mixed_precision/humming.py")
    assert "layers" not in document["contents"]


def test_devices_and_exit_codes(w2, capsys):
    assert main(["inspect", str(w2), "--device", "sm9O"]) == 2
    assert "Did you mean sm90?" in " ".join(capsys.readouterr().err.split())
    assert main(["inspect", str(w2), "--device", "sm80", "--engine", "vllm"]) == 0
    assert main(["inspect", str(w2), "--device", "cpu", "--engine", "vllm"]) == 1
    assert main(["inspect", str(w2), "--engine", "vllm"]) == 0
    assert device_named("SM_86") == Hardware("cuda", 86)
    with pytest.raises(ValueError, match="is no device; use one of sm75, "):
        device_named("tpu")


def test_plan_tells_the_kernels_of_what_will_be_saved(tmp_path, capsys):
    folder = tiny_llama_folder(torch.bfloat16, 2, 0, False)
    arguments = ["plan", str(folder), "--scheme", "W2A16G64", "--device", "metal"]
    assert main(arguments) == 0
    assert "engines on Apple GPU, the best choice first" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    assert engines["hardware"] == "Apple GPU"
    assert [x["engine"] for x in engines["choices"]][:2] == ["MLX", "llama.cpp"]
    kernels = {x["engine"]: x["kernels"][0]["kernel"] for x in engines["choices"]}
    assert kernels["llama.cpp"] == "ggml Q2_0, Metal"
    assert kernels["vLLM"] is None
    assert main(["plan", str(folder), "--scheme", "W2A16G64", "--device", "sm9"]) == 2


def test_plan_takes_the_capability_of_a_card(capsys):
    folder = tiny_llama_folder(torch.bfloat16, 2, 0, False)
    assert main(["plan", str(folder), "--scheme", "W4A16G64", "--gpu", "t4", "--json"]) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    assert engines["hardware"] == "NVIDIA 7.5"
    assert main(["plan", str(folder), "--scheme", "W4A16G64", "--gpu", "24GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"]["hardware"] is None


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("W4A61", "W4A16"),
        ("w2a61g64", "W2A16G64"),
        ("FP8_DYNAMC", "FP8_DYNAMIC"),
        ("NVFP5", "NVFP4"),
    ],
)
def test_a_mistyped_scheme_is_recognised(mistyped, meant, capsys):
    assert main(["schemes", mistyped]) == 1
    assert f"(did you mean {meant}?)" in capsys.readouterr().err


def test_a_scheme_that_fits_is_named(capsys):
    folder = tiny_llama_folder(torch.bfloat16, 2, 0, False)
    assert main(["plan", str(folder), "--scheme", "W3A16_ASYM_G48"]) == 1
    assert "such as W3A16_ASYM_G64" in capsys.readouterr().err
