"""What SGLang makes of checkpoints is what `autoround_modifier.engines.sglang_table` says."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from loader import Loaded, Refused, cache_format, fused_layers, load
from sglang.srt.models.gemma2 import Gemma2ForCausalLM
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.registry import ModelRegistry
from torch import nn

CAPABILITIES = (75, 80, 89, 90, 100)
FILES = (Path(__file__).parents[2] / "recipes").glob("*.yaml")
RECIPES = sorted(x.stem for x in FILES if not x.stem.startswith("gguf_"))  # those are of llama.cpp
HUMMING = "humming"
SCHEMES = {
    "Marlin": ("CompressedTensorsWNA16", "CompressedTensorsW4A16Fp4"),
    "scheme W8A8Fp8": ("CompressedTensorsW8A8Fp8",),
    "scheme W8A16Fp8": ("CompressedTensorsW8A16Fp8",),
    "scheme W4A4Fp4": ("CompressedTensorsW4A4Fp4",),
    "int8_scaled_mm": ("CompressedTensorsW8A8Int8",),
}
OWN_KERNEL = "HummingLinearMethod"
PLAIN = ""  # scheme of a layer in 16 bits
PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


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


def check(
    checkpoints: Path,
    name: str,
    capability: int,
    table: dict[str, str],
    model_class: type[nn.Module] = LlamaForCausalLM,
) -> None:
    """Compare what SGLang says of a checkpoint with what the table says."""
    document = json.loads((checkpoints / "said.json").read_text())[name]
    said, problems = document["kernels"][str(capability)], document["problems"]
    fused = fused_layers(model_class)
    ordinary = answer(checkpoints / name, capability, fused=fused)
    humming = answer(checkpoints / name, capability, HUMMING, fused=fused)
    if capability == 90 and model_class is LlamaForCausalLM:
        table[name] = f"{in_words(ordinary)}; --quantization humming: {in_words(humming)}"
    if problems[model_class.__name__]:
        assert isinstance(ordinary, Refused), ordinary
        assert isinstance(humming, Refused), humming
        return
    if all(choice["kernel"] and not choice["option"] for choice in said):
        assert not isinstance(ordinary, Refused), ordinary
        schemes = {loaded.scheme for loaded in ordinary.values()}
        kernels = {choice["kernel"] for choice in said}
        assert all(any(x in SCHEMES[kernel] for kernel in kernels) for x in schemes - {PLAIN})
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


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, Gemma2ForCausalLM])
def test_what_is_said_of_names_is_right(model_class, checkpoints, table):
    """Of a class that says what it fuses, and of one that does not."""
    folders = sorted((checkpoints / "names").iterdir())
    assert len(folders) >= 12
    for folder in folders:
        for capability in (80, 90):
            check(checkpoints, f"names/{folder.name}", capability, table, model_class)


def test_names_are_refused_by_a_class_that_does_not_say_what_it_fuses(checkpoints):
    folder = checkpoints / "names" / "by_name"
    with pytest.raises(Refused, match=r"Unable to find matching target for .*\.qkv_proj"):
        load(folder, 90, fused=fused_layers(LlamaForCausalLM))
    assert load(folder, 90, fused=fused_layers(Gemma2ForCausalLM))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_read_alike_whether_a_class_says_what_it_fuses(recipe, checkpoints):
    folder = checkpoints / "recipes" / recipe
    silent, saying = (
        answer(folder, 100, fused=fused_layers(x)) for x in (LlamaForCausalLM, Gemma2ForCausalLM)
    )
    if isinstance(silent, Refused):
        assert isinstance(saying, Refused)
    else:
        assert silent == saying


def test_what_classes_say_of_the_layers_that_they_fuse(checkpoints):
    known = json.loads((checkpoints / "classes.json").read_text())
    assert len(known["silent"]) > 20
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"} < set(known["silent"])
    for name in known["silent"] + known["saying"]:
        model_class, found = ModelRegistry.resolve_model_cls([name])
        assert found == name
        fused = fused_layers(model_class)
        if name in known["saying"]:
            assert {x: list(fused[x]) for x in PARTS} == PARTS, name
        else:
            assert not fused, name
        assert re.search(r"[\".]qkv_proj\"", source_of(model_class)), name


def source_of(model_class: type[nn.Module]) -> str:
    """:return: of the modules of a class and its bases, and of classes of models in them"""
    own = {inspect.getmodule(x) for x in model_class.__mro__}
    classes = [x for module in own for x in vars(module).values() if inspect.isclass(x)]
    modules = own | {inspect.getmodule(x) for x in classes}
    return "\n".join(
        inspect.getsource(x)
        for x in modules
        if x is not None and x.__name__.startswith("sglang.srt.models.")
    )
