"""What SGLang makes of checkpoints is what `autoround_modifier.engines.sglang_table` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from loader import Loaded, Refused, cache_format, fused_layers, load
from sglang.srt.models.gemma3_causal import Gemma3ForCausalLM
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM

CAPABILITIES = (75, 80, 89, 90, 100)
RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
HUMMING = "humming"
SCHEMES = {
    "Marlin": ("CompressedTensorsWNA16", "CompressedTensorsW4A16Fp4"),
    "scheme W8A8Fp8": ("CompressedTensorsW8A8Fp8",),
    "scheme W8A16Fp8": ("CompressedTensorsW8A16Fp8",),
    "scheme W4A4Fp4": ("CompressedTensorsW4A4Fp4",),
    "int8_scaled_mm": ("CompressedTensorsW8A8Int8",),
}
OWN_KERNEL = "HummingLinearMethod"


def answer(
    folder: Path, capability: int, option: str | None = None, **options: object
) -> dict[str, Loaded] | Refused:
    try:
        return load(folder, capability, option, **options)
    except Refused as refused:
        return refused


def in_words(found: dict[str, Loaded] | Refused) -> str:
    if isinstance(found, Refused):
        return f"refused: {str(found).splitlines()[0][:90]}"
    return ", ".join(sorted({x.scheme or x.method for x in found.values()}))


def check(checkpoints: Path, name: str, capability: int, table: dict[str, str]) -> None:
    """Compare what SGLang says of a checkpoint with what the table says."""
    said = json.loads((checkpoints / "said.json").read_text())[name][str(capability)]
    ordinary = answer(checkpoints / name, capability)
    humming = answer(checkpoints / name, capability, HUMMING)
    if capability == 90:
        table[name] = f"{in_words(ordinary)}; --quantization humming: {in_words(humming)}"
    if all(choice["kernel"] and not choice["option"] for choice in said):
        assert not isinstance(ordinary, Refused), ordinary
        schemes = {loaded.scheme for loaded in ordinary.values()}
        kernels = {choice["kernel"] for choice in said}
        assert all(any(x in SCHEMES[kernel] for kernel in kernels) for x in schemes)
        assert all(schemes & set(SCHEMES[kernel]) for kernel in kernels)
        return
    assert isinstance(ordinary, Refused), ordinary
    if any(choice["kernel"] is None for choice in said):
        assert isinstance(humming, Refused), humming
        return
    assert [choice["option"] for choice in said] == [f"--quantization {HUMMING}"]
    assert not isinstance(humming, Refused), humming
    assert {loaded.method for loaded in humming.values()} == {OWN_KERNEL}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_table_is_right_about_each_recipe(recipe, capability, checkpoints, table):
    check(checkpoints, f"recipes/{recipe}", capability, table)


def test_the_table_is_right_about_other_schemes(checkpoints, table):
    folders = sorted((checkpoints / "schemes").iterdir())
    assert len(folders) >= 15
    for folder in folders:
        for capability in CAPABILITIES:
            check(checkpoints, f"schemes/{folder.name}", capability, table)


def test_the_cache_is_quantized_as_the_recipe_says(checkpoints):
    quantized = {name for name in RECIPES if cache_format(checkpoints / "recipes" / name) == "FP8"}
    assert quantized == {"w4a16_fp8_kv_autoround"}


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM])
def test_layers_named_one_by_one_are_refused_where_the_class_fuses_without_saying(
    model_class, checkpoints
):
    """`AutoSchemeModifier` names layers, and SGLang looks for the name of the fused layer."""
    fused = fused_layers(model_class)
    assert not fused
    refused = {}
    for name in RECIPES:
        folder = checkpoints / "recipes" / name
        found = answer(folder, 90, fused=fused)
        if isinstance(found, Refused) != isinstance(answer(folder, 90), Refused):
            refused[name] = str(found)
    assert set(refused) == {"autoscheme_nvfp4_fp8_autoround"}
    (reason,) = refused.values()
    assert "Unable to find matching target for model.layers.0.self_attn.qkv_proj" in reason


@pytest.mark.parametrize("model_class", [Gemma3ForCausalLM, Qwen3MoeForCausalLM])
def test_they_are_loaded_where_the_class_says_what_it_fuses(model_class, checkpoints):
    folder = checkpoints / "recipes" / "autoscheme_nvfp4_fp8_autoround"
    assert load(folder, 90, fused=fused_layers(model_class))
