"""host/matching.py: which modules the targets of a recipe mean."""

from __future__ import annotations

import pytest
from conftest import tiny_llama
from torch import nn

from autoround_modifier.host import matching


class Twice(nn.Linear):
    """A class derived from Linear."""


def model() -> nn.Module:
    attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "o_proj")})
    mlp = nn.ModuleDict({"up_proj": nn.Linear(4, 4), "gate_proj": Twice(4, 4)})
    return nn.ModuleDict({"attn": attention, "mlp": mlp, "head": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("mlp.up_proj", True),
        ("Linear", True),
        ("re:.*up_proj$", True),
        ("re:up_proj", False),  # expressions match from the start of the name
        ("up_proj", False),
        ("mlp", False),
        ("Module", True),  # any base class, the module's own first
        (["head", "Linear"], True),
        ([], False),
    ],
)
def test_one_module(target, expected):
    layer = nn.Linear(4, 4)
    assert matching.is_match("mlp.up_proj", layer, target) is expected


def test_derived_classes_are_matched_by_their_base():
    assert matching.is_match("mlp.gate_proj", Twice(4, 4), "Linear")
    assert matching.is_match("mlp.gate_proj", Twice(4, 4), "Twice")
    assert not matching.is_match("mlp.up_proj", nn.Linear(4, 4), "Twice")


def test_exact_names_come_before_expressions_and_these_before_classes():
    targets = ["Linear", "re:.*proj", "re:mlp.*", "mlp.up_proj"]
    found = matching.match_targets("mlp.up_proj", nn.Linear(4, 4), targets)
    # Expressions are in alphabetical order, not in that of the recipe.
    assert found == ["mlp.up_proj", "re:.*proj", "re:mlp.*", "Linear"]
    assert matching.match_targets("head", nn.Linear(4, 4), targets) == ["Linear"]
    assert matching.match_targets("mlp", nn.Identity(), ["Linear"]) == []


def test_modules_come_in_the_order_of_the_model_without_ignored_ones():
    found = matching.match_named_modules(
        model(), ["head", "Linear", "re:.*q_proj"], ["re:.*o_proj", "mlp.gate_proj"]
    )
    names = [name for name, _ in found]
    assert names == ["attn.q_proj", "attn.k_proj", "mlp.up_proj", "head"]


def test_fused_layers_are_found_by_their_names():
    assert ("q_proj", "k_proj", "v_proj") in matching.FUSED_LAYER_NAMES
    assert ("gate_proj", "up_proj") in matching.FUSED_LAYER_NAMES
    assert ("q_a_proj", "kv_a_proj_with_mqa") in matching.FUSED_LAYER_NAMES
    assert ("w1", "w3") in matching.FUSED_LAYER_NAMES
    llama = tiny_llama(num_layers=1)
    layers = {x: name for name, x in llama.named_modules() if isinstance(x, nn.Linear)}
    found = [[layers[x] for x in group] for group in matching.fused_layers(llama, layers)]
    prefix = "model.layers.0."
    assert found == [
        [prefix + f"self_attn.{x}_proj" for x in "qkv"],
        [prefix + "mlp.gate_proj", prefix + "mlp.up_proj"],
        [prefix + "self_attn.o_proj"],
        [prefix + "mlp.down_proj"],
        ["lm_head"],
    ]
