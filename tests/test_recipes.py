"""Shipped recipes: found by name, sound, and run on a tiny model."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, quantize, tiny_llama
from helpers import quantized_layers
from llmcompressor.recipe import Recipe

from autoround_modifier import AutoRoundModifier, find_recipe, list_recipes, load_recipe
from autoround_modifier.calibration.mixture import data_recipes
from autoround_modifier.checkpoints.gguf_blocks import SavedBlocks, find_blocks_file
from autoround_modifier.errors import RecipeError
from autoround_modifier.recipes import check_recipe

SHIPPED = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
EXPECTED = {
    "w2a16_autoround",
    "w2a16_asym_autoround",
    "w2a16_best_autoround",
    "w2a16_distilled_autoround",
    "w2a16_g128_autoround",
    "w2a16_g256_autoround",
    "w3a16_autoround",
    "w3a16_asym_autoround",
    "w4a16_autoround",
    "w4a16_asym_autoround",
    "w8a16_autoround",
    "w2a16_w4a16_mixed_autoround",
    "smoothquant_w4a16_autoround",
    "fp8a16_autoround",
    "mxfp4a16_autoround",
    "mxfp8a16_autoround",
    "nvfp4a16_autoround",
    "w8a8_autoround",
    "w8a8_static_autoround",
    "w4a8_autoround",
    "w4afp8_autoround",
    "fp8_dynamic_autoround",
    "fp8_static_autoround",
    "fp8_block_autoround",
    "mxfp4_autoround",
    "mxfp8_autoround",
    "nvfp4_autoround",
    "w4a16_fp8_kv_autoround",
    "nvfp4_w4a16_mixed_autoround",
    "fp8_w2a16_mixed_autoround",
    "deepseek_r1_int2_mixed",
    "autoscheme_w2_w4_w8_autoround",
    "autoscheme_nvfp4_fp8_autoround",
    "gguf_q2_k_s_autoround",
    "gguf_q3_k_m_autoround",
    "gguf_q4_k_m_autoround",
}
PRESETS = {"fp8_block_autoround": "rtn"}  # others: default
TUNED = ("AutoRoundModifier", "ScaleDistillationModifier")


def test_every_promised_recipe_is_shipped():
    assert set(SHIPPED) >= EXPECTED
    assert set(list_recipes()) == set(SHIPPED)


@pytest.mark.parametrize("name", ["w2a16_autoround", "w2a16_autoround.yaml"])
def test_found_by_name_from_any_directory(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name).name == "w2a16_autoround.yaml"


def test_a_file_wins_over_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    mine = Path("w2a16_autoround.yaml")
    mine.write_text("{}")
    assert find_recipe("w2a16_autoround.yaml") == mine


@pytest.mark.parametrize("name", SHIPPED)
def test_loads(name):
    path = find_recipe(name)
    check_recipe(path.read_text(), str(path))
    modifiers = Recipe.create_instance(str(path)).modifiers
    tuned = [modifier for modifier in modifiers if isinstance(modifier, AutoRoundModifier)]
    assert len(tuned) == 1
    assert tuned[0].preset == PRESETS.get(name, "default")
    first_line = path.read_text().splitlines()[0]
    for scheme in (tuned[0].config_groups or {}).values():
        assert f"{scheme.weights.num_bits}-bit" in path.read_text(), first_line


def test_fields_of_both_modifiers_are_checked():
    text = find_recipe("w2a16_distilled_autoround").read_text().replace("lr: 0.005", "rate: 0.005")
    with pytest.raises(RecipeError, match=r"mine.yaml:17: `ScaleDistillationModifier`: rate"):
        check_recipe(text, "mine.yaml")


def test_fields_of_a_shipped_recipe_are_replaced():
    (modifier,) = load_recipe("w2a16_autoround", preset="light", seed=7).modifiers
    assert (modifier.iters, modifier.lr, modifier.seed) == (50, None, 7)
    assert load_recipe("w2a16_autoround", iters=3).modifiers[0].iters == 3


def test_a_preset_replaces_what_a_saved_recipe_spells_out(tmp_path):
    quantize(tiny_llama(), load_recipe("w4a16_autoround", iters=2), output_dir=tmp_path / "out")
    (modifier,) = load_recipe(tmp_path / "out" / "recipe.yaml", preset="light").modifiers
    assert modifier.iters == 50


def test_a_recipe_without_autoround_has_no_fields_to_replace(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("a_stage:\n  b_modifiers:\n    GPTQModifier: {scheme: W4A16}\n")
    with pytest.raises(RecipeError, match="no AutoRoundModifier"):
        load_recipe(path, iters=2)


def groups_of(recipe: Path) -> list:
    modifiers = Recipe.create_instance(str(recipe)).modifiers
    (tuned,) = [x for x in modifiers if isinstance(x, AutoRoundModifier)]
    return list(tuned.resolved_config.config_groups.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_runs(name, tmp_path):
    text = yaml.safe_load(find_recipe(name).read_text())
    for stage in text.values():
        for group in stage.values():
            for fields in (group[name] for name in group if name in TUNED):
                if fields.get("preset") != "rtn":
                    fields |= {"iters": 2, "batch_size": 4}
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(text, sort_keys=False))
    # groups of 128 and 256 do not fit layers of 64 features
    wide = any(size in str(groups_of(recipe)) for size in ("128", "256"))
    model = tiny_llama(hidden_size=256 if wide else 64)
    model = quantize(model, str(recipe), output_dir=tmp_path / "out")
    blocks = find_blocks_file(tmp_path / "out")
    quantized = quantized_layers(model) if blocks is None else SavedBlocks(tmp_path / "out").types
    assert len([layer for layer in quantized if layer.endswith("_proj")]) == 14
    assert (blocks is not None) == name.startswith("gguf_")
    assert (tmp_path / "out" / "recipe.yaml").exists()


def test_a_wheel_carries_the_recipes(tmp_path):
    """Built with the environment's hatchling and without an index, so without network."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in SHIPPED:
        assert f"autoround_modifier/shipped_recipes/{name}.yaml" in names
    for path in data_recipes().values():
        assert f"autoround_modifier/shipped_recipes/data/{path.name}" in names
