"""Bad input is refused before the first forward pass, with the place and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from conftest import (
    quantize,
    tiny_llama,
    tiny_llama_folder,
    tiny_tokenizer,
    token_samples,
    weight_scheme,
)

from autoround_modifier import AutoRoundModifier, oneshot
from autoround_modifier.errors import (
    CalibrationError,
    NonFiniteError,
    OutputExistsError,
    RecipeError,
    SchemeError,
)
from autoround_modifier.tuning import Tuner

NO_DATA = object()


def poisoned(model: torch.nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")


def renamed_attention(model: torch.nn.Module) -> None:
    """compressed-tensors knows attention layers by the name of their class."""
    for block in model.model.layers:
        block.self_attn.__class__ = type("Mixer", (type(block.self_attn),), {})


@dataclass
class Row:
    """
    :param fields: of the modifier
    :param error: what is raised
    :param message: pieces of its text: what is wrong, where, and what would be right
    :param prepare: changes the model first
    """

    name: str
    fields: dict
    error: type[Exception]
    message: tuple[str, ...]
    dataset: object = None
    prepare: Callable[[torch.nn.Module], None] = field(default=lambda model: None)

    def __str__(self) -> str:
        return self.name


def groups(**kwargs) -> dict:
    return {"config_groups": {"group_0": weight_scheme(**kwargs)}}


FIELD_ROWS = [
    Row("unknown preset", {"preset": "bset"}, ValueError, ("bset", "best", "opt_rtn")),
    Row("unknown scheme", {"scheme": "W9A99"}, ValueError, ("W9A99", "W4A16", "config_groups")),
    Row("unknown field", {"iterations": 5}, ValueError, ("iterations",)),
    Row("negative iters", {"iters": -1}, ValueError, ("iters", "greater than or equal to 0")),
    Row("observer", {"weight_observer": "mse"}, ValueError, ("weight_observer", "no effect")),
    Row("batch of nothing", {"batch_size": 0}, ValueError, ("batch_size",)),
    Row(
        "tuning on no samples",
        {"preset": "rtn", "iters": 5},
        ValueError,
        ("num_calibration_samples",),
    ),
]

MODEL_ROWS = [
    Row(
        "group size that does not divide",
        groups(group_size=48),
        SchemeError,
        (
            "64 input features, group_size 48; 64, 32, 16 would divide",
            "model.layers.0.self_attn.q_proj",
            "128 input features, group_size 48",
            "model.layers.1.mlp.down_proj",
        ),
    ),
    Row(
        "group larger than the layer",
        groups(group_size=128),
        SchemeError,
        ("64 input features, group_size 128", "model.layers.0.mlp.up_proj", "and 4 more"),
    ),
    Row("no data", groups(), CalibrationError, ("dataset=", "self_generated", "rtn"), NO_DATA),
    Row(
        "no data for the scale search",
        {**groups(), "preset": "opt_rtn"},
        CalibrationError,
        ("scale_search",),
        NO_DATA,
    ),
    Row(
        "no target matched",
        groups(targets=("re:.*feed_forward.*",)),
        RecipeError,
        ("re:.*feed_forward.*", "model.layers.0.self_attn.q_proj"),
    ),
    Row(
        "a target that is no layer",
        groups(targets=("LlamaMLP",)),
        RecipeError,
        ("model.layers.0.mlp", "linear layers inside"),
    ),
    Row(
        "NaN in a weight",
        groups(),
        NonFiniteError,
        ("model.layers.1.mlp.up_proj",),
        prepare=poisoned,
    ),
    Row(
        "no data for a static scale of activations",
        {"scheme": "FP8", "preset": "rtn"},
        CalibrationError,
        ("static scale of activations", "dataset="),
        NO_DATA,
    ),
    Row(
        "quantized outputs",
        {"config_groups": {"group_0": weight_scheme() | {"output_activations": {"num_bits": 8}}}},
        SchemeError,
        ("`output_activations` are not supported", "q_proj"),
    ),
    Row(
        "an embedding with quantized activations",
        {"scheme": "W8A8", "targets": ["Embedding"]},
        SchemeError,
        ("embeddings are token ids", "embed_tokens"),
    ),
    Row(
        "an observer that does not exist",
        {"scheme": "FP8", "input_observer": "maxmin"},
        SchemeError,
        ("maxmin", "static_minmax"),
    ),
    Row(
        "one scale for a tensor",
        {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "strategy": "tensor"},
                }
            }
        },
        SchemeError,
        ("tensor", "use `group`, `channel`"),
    ),
    Row(
        "one bit",
        groups(num_bits=1),
        SchemeError,
        ("num_bits is 1", "2 to 8"),
    ),
    Row(
        "an integer key-value cache",
        {**groups(), "kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"}},
        SchemeError,
        ("kv_cache_scheme", "type: float"),
    ),
    Row(
        "a key-value cache that is not there",
        {**groups(), "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
        SchemeError,
        ("kv_cache_scheme", "no attention layer"),
        prepare=renamed_attention,
    ),
]


@pytest.mark.parametrize("row", FIELD_ROWS, ids=str)
def test_fields(row):
    with pytest.raises(row.error) as raised:
        AutoRoundModifier(**row.fields)
    for piece in row.message:
        assert piece in str(raised.value)


@pytest.mark.parametrize("row", MODEL_ROWS, ids=str)
def test_before_the_first_forward(row):
    model = tiny_llama()
    row.prepare(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = []
    model.model.embed_tokens.register_forward_hook(lambda *_: forwards.append(1))
    recipe = AutoRoundModifier(**{"iters": None, "ignore": ["lm_head"], **row.fields})
    dataset = {} if row.dataset is NO_DATA else {"dataset": token_samples()}
    with pytest.raises(row.error) as raised:
        oneshot(model=model, recipe=recipe, processor=tiny_tokenizer(), **dataset)
    for piece in row.message:
        assert piece in str(raised.value)
    assert not forwards
    after = model.state_dict()
    assert before.keys() == after.keys()  # no scales were attached
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(), after[name].nan_to_num())


def test_empty_dataset():
    recipe = AutoRoundModifier(**groups(), iters=2)
    empty = token_samples().select([])
    with pytest.raises(CalibrationError, match="dataset is empty"):
        oneshot(model=tiny_llama(), recipe=recipe, dataset=empty, processor=tiny_tokenizer())


def test_no_recipe():
    with pytest.raises(RecipeError, match="no recipe"):
        oneshot(model=tiny_llama(), dataset=token_samples(), processor=tiny_tokenizer())


@pytest.mark.parametrize("fields", [{"iters": 2}, {"preset": "opt_rtn"}], ids=["tuned", "opt_rtn"])
def test_infinity_in_an_activation_names_the_place(fields, log):
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data.fill_(float("inf"))
    recipe = AutoRoundModifier(**groups(), **fields, ignore=["lm_head"])
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1"):
        quantize(model, recipe)
    assert any("7 of 14 layers quantized" in line for line in log)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0


def test_two_quantizers_on_the_same_layers():
    recipe = """
quant_stage:
  first_modifiers:
    AutoRoundModifier: {iters: 2, ignore: [lm_head], scheme: W4A16, targets: ["re:.*down_proj$"]}
  second_modifiers:
    GPTQModifier: {ignore: [lm_head], scheme: W8A16, targets: ["re:.*down_proj$"]}
"""
    with pytest.raises(RecipeError, match=r"another modifier.*model\.layers\.0\.mlp\.down_proj"):
        quantize(tiny_llama(), recipe)


def test_an_output_folder_with_files_is_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    model = tiny_llama()
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(OutputExistsError, match="not empty"):
        quantize(model, AutoRoundModifier(**groups(), iters=2), output_dir=tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "precious"
    assert not forwards


def test_a_target_outside_of_blocks_is_searched_and_says_so(log):
    recipe = AutoRoundModifier(**groups(), iters=2)
    quantize(tiny_llama(), recipe)
    message = "outside of the tuned blocks, quantized by the scale search: lm_head"
    assert any(message in line for line in log)


STAGE = "a_stage:\n  b_modifiers:\n    AutoRoundModifier:"

RECIPES = {
    "plain modifiers key": ("modifiers:\n  AutoRoundModifier: {}\n", ":1:", "`modifiers`"),
    "group key": ("a_stage:\n  quant:\n    AutoRoundModifier: {}\n", ":2:", "_modifiers"),
    "no body": (f"{STAGE}\n", ":3:", "AutoRoundModifier: {}"),
    "unknown field": (f"{STAGE}\n      iterations: 2\n", ":3:", "iterations"),
    "unknown preset": (f"{STAGE}\n      preset: x\n", ":3:", "opt_rtn"),
    "same modifier twice": (
        f"{STAGE} {{}}\n    AutoRoundModifier: {{}}\n",
        ":4:",
        "a second `AutoRoundModifier`",
    ),
    "nothing": ("# only a comment\n", "recipe.yaml", "no modifiers"),
    "not yaml": ("a_stage: [\n", "recipe.yaml", "not valid YAML"),
    "code": (f"{STAGE}\n      preset: !!python/name:os.system\n", "recipe.yaml", "python"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_files(name, tmp_path):
    text, place, remedy = RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    for recipe in (str(path), text):
        with pytest.raises(RecipeError) as raised:
            quantize(tiny_llama(), recipe)
        assert place.removeprefix("recipe.yaml") in str(raised.value)
        assert remedy in str(raised.value)


def test_unknown_recipe_name_lists_the_shipped_ones():
    with pytest.raises(RecipeError, match="w2a16_autoround"):
        oneshot(model=str(tiny_llama_folder(torch.bfloat16, 2, 0, False)), recipe="w1a16_autoround")


def test_a_broken_run_says_what_was_done(monkeypatch, log):
    calls = []
    original = Tuner.run

    def fails_on_the_second_block(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(Tuner, "run", fails_on_the_second_block)
    with pytest.raises(MemoryError):
        quantize(tiny_llama(), AutoRoundModifier(**groups(), iters=2, ignore=["lm_head"]))
    assert any("7 of 14 layers quantized" in line for line in log)


def test_text_without_the_right_field(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"body": "w1 w2"}\n')
    with pytest.raises(CalibrationError, match=r"data\.jsonl:1: no field `text`.*body"):
        quantize(tiny_llama(), AutoRoundModifier(**groups(), iters=2), str(path), max_seq_length=4)
