"""The commands `inspect`, `schemes` and `recipes`: what they print, and their exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import quantize, tiny_llama, tiny_llama_folder, weight_scheme
from llmcompressor.core import reset_session
from torch import bfloat16

from autoround_modifier import AutoRoundModifier, list_recipes
from autoround_modifier.cli.main import main
from autoround_modifier.recipes import check_recipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("w4")
    recipe = AutoRoundModifier(
        preset="rtn", ignore=["lm_head"], config_groups={"a": weight_scheme(4)}
    )
    quantize(tiny_llama(), recipe, output_dir=folder)
    reset_session()
    return folder


@pytest.fixture
def misread(saved, tmp_path) -> Path:
    """A checkpoint of which vLLM takes quantized layers for 16-bit ones."""
    folder = tmp_path / "misread"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head", "re:.*layers.0.mlp.*"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def printed(capsys, *arguments: str | Path, code: int = 0) -> str:
    """:return: standard output of a command that ends with an exit code"""
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out


# ------------------------------------------------------------------------- inspect


def test_inspect_prints_contents_engines_and_problems(saved, capsys):
    text = printed(capsys, "inspect", saved)
    assert f"{saved}: LlamaForCausalLM" in text
    assert "compressed-tensors: pack-quantized" in text
    assert "4.524 bits per weight, scales and zero points included; 73,728 weights" in text
    (row,) = (line.split() for line in text.splitlines() if line.split()[:1] == ["q_proj"])
    assert row == ["q_proj", "W4A16", "G32", "2", "8,192", "4.531", "4.64", "kB"]
    assert "Not quantized:\n  lm_head\n  model.embed_tokens\n" in text
    assert f"  vllm serve {saved}\n" in text
    assert f"AutoModelForCausalLM.from_pretrained('{saved}'" in text
    assert "Checked for vllm: no problem with names, shapes and schemes." in text


def test_inspect_of_an_unquantized_checkpoint(capsys):
    text = printed(capsys, "inspect", tiny_llama_folder(bfloat16, 2, 0, False), "--engine", "any")
    assert "format            not quantized" in text
    assert "quantized layers" not in text
    assert "Elsewhere" not in text
    assert "  vllm serve " in text


def test_inspect_as_json_is_one_document(saved, capsys):
    document = json.loads(printed(capsys, "inspect", saved, "--json"))
    assert document["loads_as_meant"] == {"vllm": True, "transformers": True}
    assert document["problems"] == []
    contents = document["contents"]
    assert contents["quantized_weights"] == 73_728
    assert contents["schemes"][0]["label"] == "W4A16 G32"
    kinds = {kind["kind"]: kind for kind in contents["kinds"]}
    assert kinds["q_proj"]["bytes"] == 2 * (2048 + 256 + 16)
    vllm = document["engines"][0]
    assert vllm["engine"] == "vLLM"
    on = {x["hardware"]: x["kernels"][0]["kernel"] for x in vllm["elsewhere"]}
    assert on["NVIDIA 9.0"] == "Humming"
    assert on["NVIDIA 8.0"] == "Marlin"
    assert on["CPU"] == "CPUWNA16"


def test_exit_codes_of_inspect(saved, misread, tmp_path, capsys):
    for engine in ("vllm", "transformers", "any"):
        assert main(["inspect", str(saved), "--engine", engine]) == 0
    capsys.readouterr()
    text = printed(capsys, "inspect", misread)  # listed, and no more was asked
    assert "Problem: vLLM: takes quantized layers for layers in 16 bits" in text
    assert "Name them in `targets`." in text
    assert "vllm serve" not in text
    assert main(["inspect", str(misread), "--engine", "vllm"]) == 1
    assert main(["inspect", str(misread), "--engine", "any"]) == 1
    assert main(["inspect", str(misread), "--engine", "sglang"]) == 2
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "refused: " in output.err
    assert "is no checkpoint: it has no config.json" in output.err


@pytest.fixture
def named(saved, tmp_path) -> Path:
    """A checkpoint whose layers are named one by one, as other programs write it."""
    folder = tmp_path / "named"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    layers = [
        f"model.layers.{block}.{name}_proj"
        for block in range(2)
        for name in (
            *(f"self_attn.{x}" for x in "qkvo"),
            *(f"mlp.{x}" for x in ("gate", "up", "down")),
        )
    ]
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_inspect_knows_that_sglang_looks_for_names_of_fused_layers(saved, named, capsys):
    device = ("--device", "sm90")
    assert "python -m sglang.launch_server" in printed(capsys, "inspect", saved, *device)
    text = printed(capsys, "inspect", named, *device, "--engine", "any")
    assert "SGLang: looks for layers that it fuses by their own names, which no target" in text
    assert "model.layers.0.self_attn.qkv_proj" in text
    assert "Name them beside their parts in `config.json`." in text
    assert "python -m sglang.launch_server" not in text
    (row,) = (x for x in text.splitlines() if x.split()[:1] == ["SGLang"])
    assert "does not load it as it is meant: see below" in row
    document = json.loads(printed(capsys, "inspect", named, *device, "--json"))
    assert [problem["checked_for"] for problem in document["problems"]] == ["sglang"]
    assert "SGLang" not in [choice["engine"] for choice in document["choices"]]
    (sglang,) = (x for x in document["engines"] if x["engine"] == "SGLang")
    assert sglang["command"] is None
    assert document["loads_as_meant"] == {"vllm": True, "transformers": True}


# ------------------------------------------------------------------------- schemes


def test_schemes_lists_all(capsys):
    text = printed(capsys, "schemes")
    (row,) = (line for line in text.splitlines() if line.split()[:1] == ["FP8_DYNAMIC"])
    assert row.split()[1] == "8.004"
    assert ", fp8_dynamic_autoround," in row
    assert "W8A8, INT8" in text
    assert "W3A16_ASYM_G32" in text


def test_one_scheme_in_detail(capsys):
    text = printed(capsys, "schemes", "W2A16G64")
    assert "bits per weight   2.250" in text
    assert "w2a16_autoround, w2a16_best_autoround, w2a16_distilled_autoround" in text
    fields = yaml.safe_load(text.partition("spelled out in a recipe:")[2])
    (entry,) = fields["config_groups"].values()
    assert entry["weights"]["group_size"] == 64
    (entry,) = json.loads(printed(capsys, "schemes", "W2A16G64", "--json"))
    assert entry["bits_per_weight"] == pytest.approx(2.25, abs=1e-4)
    assert {"vLLM", "SGLang", "llama.cpp", "MLX"} < {x["engine"] for x in entry["engines"]}


def test_a_scheme_that_is_not_known_is_refused(capsys):
    assert main(["schemes", "W17A16"]) == 1
    assert "unknown scheme `W17A16`" in capsys.readouterr().err


# ------------------------------------------------------------------------- recipes


def test_recipes_are_listed_with_their_bits(capsys):
    text = printed(capsys, "recipes", "list")
    (row,) = (line for line in text.splitlines() if line.split()[:1] == ["w2a16_autoround"])
    assert row.split()[1] == "2.25"
    assert "2-bit integer weights, symmetric, 16-bit activations" in row
    found = json.loads(printed(capsys, "recipes", "list", "--json"))
    assert [recipe["name"] for recipe in found] == list(list_recipes())
    assert all(recipe["schemes"] and recipe["description"] for recipe in found)
    (kv,) = (recipe for recipe in found if recipe["kv_cache_quantized"])
    assert kv["name"] == "w4a16_fp8_kv_autoround"
    budgets = {recipe["name"]: recipe["avg_bits"] for recipe in found if recipe["avg_bits"]}
    assert budgets == {
        "autoscheme_nvfp4_fp8_autoround": 5.0,
        "autoscheme_w2_w4_w8_autoround": 2.5,
    }


def test_a_recipe_is_shown_as_it_is(capsys):
    path = list_recipes()["nvfp4_autoround"]
    assert printed(capsys, "recipes", "show", "nvfp4_autoround") == path.read_text()
    assert main(["recipes", "show", "nvfp5"]) == 1


@pytest.mark.parametrize("name", list_recipes())
def test_a_new_recipe_runs_as_the_one_it_is_made_from(name, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    printed(capsys, "recipes", "new", file, "--from", name)
    text = file.read_text()
    check_recipe(text, str(file))
    assert yaml.safe_load(text) == yaml.safe_load(list_recipes()[name].read_text())
    assert text.startswith(f"# Made from {name}.\n#\n# ")
    assert "oneshot(" not in text
    assert "# `ignore`: layers that stay in 16 bits" in text
    assert max(map(len, text.splitlines())) <= 105


def test_a_file_is_not_replaced_by_a_new_recipe(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("kept")
    assert main(["recipes", "new", str(file)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert file.read_text() == "kept"


def test_what_needs_no_weights_needs_no_torch():
    """`schemes` and `recipes` answer at once."""
    program = (
        "import sys; sys.argv = ['autoround-modifier']\n"
        "from autoround_modifier.cli.main import main\n"
        "for command in (['recipes', 'list'], ['schemes'], ['schemes', 'W2A16G64', '--json'],\n"
        "                ['recipes', 'show', 'w2a16_autoround'], ['inspect', '--help']):\n"
        "    assert main(command) == 0\n"
        "assert 'torch' not in sys.modules, 'torch is imported'\n"
        "assert 'compressed_tensors' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
