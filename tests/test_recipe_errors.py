"""Mistakes in recipes are refused with the file, the line and the nearest name."""

from __future__ import annotations

import pytest
import yaml

from autoround_modifier import AutoRoundModifier, RecipeError, list_recipes, load_recipe, oneshot
from autoround_modifier.host.lifecycle import ModifierFactory, known_modifiers, register_modifier
from autoround_modifier.recipes import check_recipe

GROUP = "quant_stage:\n  quant_modifiers:\n"
BODY = f"{GROUP}    AutoRoundModifier:\n      scheme: W4A16\n"

WRONG = {
    "a list as stage": (
        "? [a, b]\n: {x: 1}\n",
        r"mine\.yaml:1: a list or mapping is used as a key",
    ),
    "a list as group": ("quant_stage:\n  [a]: {}\n", r"mine\.yaml:2: a list or mapping"),
    "a list as modifier": (f"{GROUP}    [a]: {{}}\n", r"mine\.yaml:3: a list or mapping"),
    "a mapping as field": (f"{BODY}      {{a: 1}}: 2\n", r"mine\.yaml:5: a list or mapping"),
    "a list as key within": (f"{BODY}      ignore: [{{[a]: 1}}]\n", r"mine\.yaml:5: a list or"),
    "a number as field": (f"{BODY}      3: 2\n", r"mine\.yaml:3: .*3 is not the name of a field"),
    "a typo in the name": (
        f"{GROUP}    AutoRoundModifer: {{scheme: W4A16}}\n",
        r"mine\.yaml:3: no modifier is named `AutoRoundModifer`; did you mean `AutoRoundModifier`",
    ),
    "a built-in name": (f"{GROUP}    GPTQModifer: {{}}\n", r"did you mean `GPTQModifier`"),
    "the base class": (f"{GROUP}    Modifier: {{}}\n", r"no modifier is named `Modifier`"),
    "nothing alike": (f"{GROUP}    xyz: {{}}\n", r"no modifier is named `xyz`$"),
    "a stage twice": (f"{BODY}{BODY}", r"mine\.yaml:5: a second `quant_stage` would replace"),
    "a group twice": (
        f"{BODY}  quant_modifiers:\n    GPTQModifier: {{}}\n",
        r"mine\.yaml:5: a second `quant_modifiers` would replace",
    ),
    "a modifier twice": (
        f"{BODY}    AutoRoundModifier:\n      scheme: W8A16\n",
        r"mine\.yaml:5: a second `AutoRoundModifier` would .*put it into a group of its own",
    ),
    "a field twice": (f"{BODY}      iters: 3\n      iters: 4\n", r"mine\.yaml:6: a second `iters`"),
    "a field within twice": (
        f"{GROUP}    GPTQModifier:\n      config_groups:\n"
        "        a: {targets: [Linear], targets: [Embedding]}\n",
        r"mine\.yaml:5: a second `targets` would replace the first$",
    ),
    "a typo in a field": (f"{BODY}      itres: 5\n", r"itres: .*; did you mean `iters`"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_mistakes_are_named(text, message):
    with pytest.raises(RecipeError, match=message):
        check_recipe(text, "mine.yaml")


def test_mistakes_are_refused_before_a_model_is_loaded():
    with pytest.raises(RecipeError, match="did you mean `AutoRoundModifier`"):
        oneshot(model="no such model", recipe=WRONG["a typo in the name"][0])


def test_the_same_names_may_stand_in_different_places():
    check_recipe(
        "a_stage:\n"
        "  b_modifiers:\n"
        "    AutoRoundModifier: &first {scheme: W4A16, ignore: [lm_head]}\n"
        "  c_modifiers:\n"
        "    AutoRoundModifier: *first\n",
        "mine.yaml",
    )


def test_modifiers_of_other_packages_are_known(monkeypatch):
    class MyModifier(AutoRoundModifier):
        pass

    monkeypatch.setattr(
        ModifierFactory, "_registered_registry", dict(ModifierFactory._registered_registry)
    )
    register_modifier(MyModifier)
    check_recipe(f"{GROUP}    MyModifier: {{scheme: W4A16}}\n", "mine.yaml")


def test_known_modifiers():
    known = known_modifiers()
    assert {"AutoRoundModifier", "AutoSchemeModifier", "GPTQModifier", "AWQModifier"} <= set(known)
    assert "Modifier" not in known


# ---------------------------------------------------------------------- load_recipe

REPLACED = {
    "a typo": ({"itres": 5}, r"with itres replaced: .*itres: .*; did you mean `iters`"),
    "a type": ({"iters": "many"}, r"iters: Input should be a valid integer"),
    "a range": ({"holdout_fraction": 0.9}, r"holdout_fraction: .*less than or equal to 0\.5"),
    "two fields that do not go together": (
        {"iters": 5, "num_calibration_samples": 0},
        r"with iters, num_calibration_samples replaced: .*tuning needs samples",
    ),
}


@pytest.mark.parametrize(("fields", "message"), REPLACED.values(), ids=REPLACED.keys())
def test_fields_that_are_replaced_are_checked(fields, message):
    with pytest.raises(RecipeError, match=message) as raised:
        load_recipe("w2a16_autoround", **fields)
    assert "w2a16_autoround.yaml" in str(raised.value)


# ---------------------------------------------------------------------- paths in recipes


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_shipped_recipes_name_no_folders(name):
    content = yaml.safe_load(list_recipes()[name].read_text())
    for stage in content.values():
        for group in stage.values():
            for fields in group.values():
                assert not set(fields) & {"checkpoint_dir", "output_dir", "cache_dir"}
