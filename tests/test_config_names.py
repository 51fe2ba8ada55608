"""Names in `config.json` that hold for every engine, and the rules by which engines match them."""

from __future__ import annotations

import random

import pytest
from compressed_tensors.utils.match import is_match, match_targets
from torch import nn

from autoround_modifier.engines.config_names import NamedLayer, complete_config
from autoround_modifier.engines.fused import fused_names, fused_parts
from autoround_modifier.engines.matching import Names, Targets, groups_of

ATTENTION, MLP = r"re:.*self_attn\..*_proj$", r"re:.*mlp\..*_proj$"


def section(groups: dict[str, list[str]], ignore: tuple[str, ...] = ()) -> dict:
    """:param groups: name -> targets"""
    return {
        "config_groups": {name: {"targets": x, "weights": {}} for name, x in groups.items()},
        "ignore": list(ignore),
    }


def layers(groups: dict[str, str | None], renamed: tuple[str, str] = ("", "")) -> list[NamedLayer]:
    """
    :param groups: path -> config group
    :param renamed: what the files have other, instead of what
    """
    return [NamedLayer(path, path.replace(*renamed), group) for path, group in groups.items()]


def check(quantization: dict, named: list[NamedLayer]) -> None:
    """Every engine gives each layer its scheme, under both spellings and under another prefix."""
    groups = groups_of(quantization)
    old_group = {}
    for layer in named:
        for name in (*layer.names, f"another.{layer.path}"):
            if layer.group is None:
                if name in layer.names:
                    assert name in quantization["ignore"]
                continue
            for rule in (Targets(groups).compressed_tensors, Targets(groups).vllm):
                found = rule(name, layer.kind)
                assert old_group.setdefault(found, layer.group) == layer.group, name
                assert found is not None


DENSE = {
    f"model.layers.{block}.{name}": group
    for block in range(3)
    for name, group in (
        ("self_attn.q_proj", "a"),
        ("self_attn.k_proj", "a"),
        ("self_attn.v_proj", "a"),
        ("self_attn.o_proj", "a"),
        ("mlp.gate_proj", "b"),
        ("mlp.up_proj", "b"),
        ("mlp.down_proj", "b"),
    )
}


def test_layers_outside_of_blocks_are_ignored_wherever_an_engine_has_them():
    """vLLM has Gemma 3n's ``model.altup_projections`` in ``model.self_decoder``."""
    result = complete_config(
        section({"a": ["Linear"]}), layers({**DENSE, "model.altup_projections.0": None})
    )
    ignored = Names(result["ignore"])
    assert "model.self_decoder.altup_projections.0" in ignored
    assert "model.self_decoder.altup_projections.1" not in ignored
    assert not any(name in ignored for name in DENSE)


def test_targets_that_hold_are_kept():
    groups = {"a": [ATTENTION], "b": [MLP]}
    result = complete_config(section(groups), layers({**DENSE, "lm_head": None}))
    assert list(groups_of(result).values()) == [[ATTENTION], [MLP]]
    assert result["ignore"] == ["lm_head"]


def test_one_class_for_all_is_kept():
    named = layers({**dict.fromkeys(DENSE, "a"), "lm_head": None})
    result = complete_config(section({"a": ["Linear"]}, ("lm_head",)), named)
    assert list(groups_of(result).values()) == [["Linear"]]


def test_both_spellings_are_ignored():
    named = layers(
        {"model.visual.blocks.0.attn.qkv": None, **dict.fromkeys(DENSE, "a")},
        ("model.visual", "visual"),
    )
    result = complete_config(section({"a": ["Linear"]}, ("visual.blocks.0.attn.qkv",)), named)
    assert result["ignore"] == ["visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"]


def test_overlapping_expressions_are_written_apart():
    """compressed-tensors takes `re:.*down_proj`, vLLM the first in the file."""
    named = layers({x: "b" if "down_proj" in x else "a" for x in DENSE})
    quantization = section({"a": ["re:.*proj"], "b": ["re:.*down_proj"]})
    assert Targets(groups_of(quantization)).vllm("model.layers.0.mlp.down_proj", "Linear") == "a"
    check(complete_config(quantization, named), named)


def test_an_expression_for_a_fused_name_does_not_win_over_names():
    """vLLM matches `qkv_proj` before its parts."""
    first = {x: "b" for x in DENSE if "layers.0.self_attn" in x}
    named = layers({**dict.fromkeys(DENSE, "a"), **first})
    quantization = section({"b": list(first), "a": [ATTENTION, MLP]})
    groups = groups_of(quantization)
    assert Targets(groups).compressed_tensors("model.layers.0.self_attn.q_proj", "Linear") == "b"
    assert Targets(groups).vllm("model.layers.0.self_attn.q_proj", "Linear") == "a"
    check(complete_config(quantization, named), named)


def test_blocks_with_schemes_of_their_own():
    named = layers({x: "b" if "layers.1." in x else "a" for x in DENSE})
    quantization = section({"b": [r"re:model\.layers\.1\..*"], "a": ["re:.*"]})
    result = complete_config(quantization, named)
    check(result, named)
    targets = [target for targets in groups_of(result).values() for target in targets]
    mlp = r"(?:gate_proj|up_proj|down_proj|gate_up_proj)"
    assert rf"re:(?:.*\.)?layers\.(?:0|2)\.mlp\.{mlp}$" in targets


def test_the_same_names_in_two_towers():
    both = {f"model.{tower}.layers.0.mlp.fc1": tower[0] for tower in ("vision", "text")}
    quantization = section({"v": ["re:.*vision.*"], "t": ["re:.*"]})
    named = layers(both)
    result = complete_config(quantization, named)
    groups = groups_of(result)
    for layer in named:
        for rule in (Targets(groups).compressed_tensors, Targets(groups).vllm):
            found = rule(layer.path, layer.kind)
            assert any(layer.path.split(".")[1] in x for x in groups[found])


def experts(group: str | None) -> dict[str, str | None]:
    return {
        f"model.layers.{block}.mlp.experts.{index}.{name}": group
        for block in range(2)
        for index in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_the_group_of_experts_comes_first_and_names_them():
    """Transformers reads experts by the first expression with `experts` in it."""
    named = layers({**{x: g for x, g in DENSE.items() if g == "a"}, **experts("b")})
    result = complete_config(section({"a": [ATTENTION], "b": [MLP]}), named)
    check(result, named)
    (first, *_) = result["config_groups"].values()
    assert first["targets"] == [r"re:(?:.*\.)?layers\.\d+\.mlp\.experts\.\d+\..+$"]


def test_shared_experts_are_not_taken_for_routed_ones():
    shared = {"model.layers.0.mlp.shared_experts.up_proj": "a"}
    named = layers({**shared, **experts("b")})
    groups = {"a": [r"re:.*shared_experts.*"], "b": [r"re:.*mlp\.experts\..*"]}
    result = complete_config(section(groups), named)
    check(result, named)
    first = next(iter(result["config_groups"].values()))
    assert first["targets"] == [r"re:.*mlp\.experts\..*"]


def test_experts_are_named_as_in_the_files_too():
    named = [
        NamedLayer(path, path.replace(".mlp.", ".block_sparse_moe.").replace("gate_proj", "w1"), g)
        for path, g in {**DENSE, **experts("b")}.items()
    ]
    result = complete_config(section({"a": [ATTENTION], "b": [MLP]}), named)
    check(result, named)
    groups = groups_of(result)
    name = "model.layers.0.block_sparse_moe.experts.2.w1"  # under which vLLM looks
    assert Targets(groups).vllm(name, "Linear") == Targets(groups).vllm(named[-1].path, "Linear")


def test_ignored_experts_are_one_expression_for_each_block_and_layer():
    named = layers({**DENSE, **experts(None)})
    host = tuple(experts(None))  # which lists each of them
    result = complete_config(section({"a": [ATTENTION], "b": [MLP]}, host), named)
    assert len(result["ignore"]) == 6
    assert r"re:(?:.*\.)?layers\.(?:1)\.mlp\.experts\.\d+\.up_proj$" in result["ignore"]


@pytest.mark.parametrize(
    "targets",
    [
        ["Linear"],
        ["re:.*proj", "re:.*down_proj"],
        ["re:.*down_proj", "model.layers.0.mlp.down_proj"],
        ["Linear", "re:.*o_proj"],
        ["Module", "Linear"],
        ["re:layers"],
    ],
)
@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"]
)
def test_the_rule_of_compressed_tensors_is_its_own(targets, name):
    groups = {f"group_{i}": [target] for i, target in enumerate(targets)}
    expected = match_targets(name, nn.Linear(1, 1), targets)
    found = Targets(groups).compressed_tensors(name, "Linear")
    assert found == (f"group_{targets.index(expected[0])}" if expected else None)


def test_fused_layers():
    names = [
        "a.q_proj",
        "a.k_proj",
        "a.v_proj",
        "a.o_proj",
        "b.gate_proj",
        "b.up_proj",
        "c.up_proj",
    ]
    assert dict(fused_parts(names)) == {
        "a.qkv_proj": ["a.q_proj", "a.k_proj", "a.v_proj"],
        "b.gate_up_proj": ["b.gate_proj", "b.up_proj"],
    }


# ------------------------------------------------------------------------- layers that are fused


def test_fused_layers_are_named_with_their_parts():
    """SGLang looks for `qkv_proj`; vLLM, compressed-tensors and Transformers for its parts too."""
    named = layers({x: "b" if "o_proj" in x else "a" for x in DENSE})
    quantization = section({g: [x.path for x in named if x.group == g] for g in "ab"})
    result = complete_config(quantization, named)
    check(result, named)
    first, second = groups_of(result).values()
    assert first == [
        r"re:(?:.*\.)?layers\.\d+\.self_attn\.(?:q_proj|k_proj|v_proj|qkv_proj)$",
        r"re:(?:.*\.)?layers\.\d+\.mlp\.(?:gate_proj|up_proj|down_proj|gate_up_proj)$",
    ]
    assert second == [r"re:(?:.*\.)?layers\.\d+\.self_attn\.o_proj$"]


def test_fused_layers_in_16_bits_are_ignored_by_their_names():
    plain = {x: None if "self_attn" in x else "a" for x in DENSE}
    host = tuple(x for x, group in plain.items() if group is None)
    result = complete_config(section({"a": ["Linear"]}, host), layers(plain))
    assert groups_of(result) == {"group_0": ["Linear"]}
    fused = [f"model.layers.{block}.self_attn.qkv_proj" for block in range(3)]
    assert result["ignore"] == [*host, *fused]


def test_fused_layers_of_several_schemes_are_not_named():
    mixed = {x: "b" if "k_proj" in x else "a" for x in DENSE if "self_attn" in x}
    named = layers({**mixed, "model.layers.0.mlp.up_proj": None})
    quantization = section({g: [x.path for x in named if x.group == g] for g in "ab"})
    result = complete_config(quantization, named)
    assert not any("qkv_proj" in x for targets in groups_of(result).values() for x in targets)
    assert not any("qkv_proj" in x for x in result["ignore"])


def test_fused_layers_are_named_as_the_files_name_them():
    named = layers(dict.fromkeys(DENSE, None), ("model.", "language_model."))
    named += layers({"model.visual.fc1": "a"})
    ignore = complete_config(section({"a": ["Linear"]}), named)["ignore"]
    assert "model.layers.0.self_attn.qkv_proj" in ignore
    assert "language_model.layers.0.self_attn.qkv_proj" in ignore


@pytest.mark.parametrize("seed", range(20))
def test_any_choice_of_schemes_holds_for_fused_layers_and_their_parts(seed):
    """As `AutoSchemeModifier` chooses, for each block: no target is without a layer."""
    chance = random.Random(seed)
    units = ("qkv", "o_proj", "gate_up", "down_proj")
    chosen = {(b, unit): chance.choice(["a", "b", "c", None]) for b in range(3) for unit in units}
    own, fused = {}, {}
    for path in DENSE:
        block, leaf = int(path.split(".")[2]), path.rpartition(".")[2]
        unit = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
        own[path] = chosen[block, unit.get(leaf.removesuffix("_proj"), leaf)]
    for block in range(3):
        fused[f"model.layers.{block}.self_attn.qkv_proj"] = chosen[block, "qkv"]
        fused[f"model.layers.{block}.mlp.gate_up_proj"] = chosen[block, "gate_up"]
    named = layers(own)
    groups = {g: [x for x, group in own.items() if group == g] for g in "abc" if g in own.values()}
    result = complete_config(section(groups), named)
    check(result, named)
    found = Targets(groups_of(result))
    ignore = Names(result["ignore"])
    by_group = {found.vllm(x, "Linear"): group for x, group in own.items() if group is not None}
    for name, group in fused.items():
        assert (name in ignore) == (group is None)
        if group is not None:
            assert by_group[found.vllm(name, "Linear")] == group
    for target in (x for targets in groups_of(result).values() for x in targets):
        assert any(is_match(name, nn.Linear(1, 1), target) for name in own)


# ------------------------------------------------------------------------- what went wrong once


def test_layers_that_are_numbers_keep_their_numbers():
    """Those of an `nn.Sequential`."""
    named = layers({**DENSE, "model.visual.merger.mlp.0": "c", "model.visual.merger.mlp.2": "c"})
    quantization = section({"a": [ATTENTION], "b": ["re:.*mlp"], "c": ["re:.*merger"]})
    check(complete_config(quantization, named), named)


def test_layers_of_experts_in_two_schemes_are_told_apart():
    named = layers({x: "a" if "down" in x else "b" for x in experts("b")})
    check(complete_config(section({"a": ["re:.*"], "b": ["re:.*_proj"]}), named), named)


@pytest.mark.parametrize(
    ("ignored", "quantized"),
    [
        (
            "model.stages.0.blocks.0.experts.{}.up_proj",
            "model.stages.0.blocks.1.experts.{}.up_proj",
        ),
        ("vision.layers.0.mlp.experts.{}.up_proj", "model.layers.0.mlp.experts.{}.up_proj"),
        ("model.vision.pool.qkv_proj", "model.layers.{}.self_attn.q_proj"),
        ("lm_head", "draft.{}.lm_head"),
    ],
)
def test_what_is_ignored_takes_no_quantized_layer_along(ignored, quantized):
    groups = {ignored.format(i): None for i in range(2)}
    groups |= {quantized.format(i): "a" for i in range(2)}
    named = layers(groups)
    result = complete_config(section({"a": ["Linear"]}), named)
    ignore = Names(result["ignore"])
    for layer in named:
        found = any(name in ignore for name in (*fused_names(layer.path), layer.path))
        assert found == (layer.group is None), layer.path


def test_a_head_is_named_because_no_class_reaches_it_in_vllm():
    named = [*layers(dict.fromkeys(DENSE, "a")), NamedLayer("lm_head", "lm_head", "a", "Head")]
    assert Targets({"a": ["Linear"]}).vllm("lm_head", "Head") is None
    result = complete_config(section({"a": ["Linear"]}), named)
    check(result, named)
    assert "Linear" in result["config_groups"]["group_0"]["targets"]


def test_expressions_that_hold_under_one_prefix_only_are_written_anew():
    """vLLM calls `model.language_model.layers` `language_model.model.layers`."""
    named = layers({x.replace("model.", "model.language_model."): "a" for x in DENSE})
    result = complete_config(section({"a": [r"re:model\.language_model\.layers.*"]}), named)
    assert Targets(groups_of(result)).vllm(
        "language_model.model.layers.0.mlp.up_proj", "Linear"
    ) == next(iter(result["config_groups"]))


def test_groups_of_attention_are_kept():
    named = layers({x: "b" if "down_proj" in x else "a" for x in DENSE})
    quantization = section({"a": ["re:.*proj"], "b": ["re:.*down_proj"], "c": ["LlamaAttention"]})
    result = complete_config(quantization, named)
    assert ["LlamaAttention"] in groups_of(result).values()


def test_names_that_end_like_others_are_written_out():
    named = layers({**DENSE, **{f"talker.{x}": "c" for x in DENSE}})
    result = complete_config(section({"a": [ATTENTION], "b": [MLP], "c": ["re:talker.*"]}), named)
    groups, owner = groups_of(result), {}
    for layer in named:
        for rule in Targets(groups).rules:
            assert owner.setdefault(rule(layer.path, layer.kind), layer.group) == layer.group
