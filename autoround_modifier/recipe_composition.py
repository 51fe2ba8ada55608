"""A recipe from a scheme or from another recipe, with fields of its modifiers replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from autoround_modifier.errors import RecipeError
from autoround_modifier.gguf_schemes import gguf_scheme
from autoround_modifier.host.schemes import is_preset_scheme
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.auto_scheme import AutoSchemeModifier
from autoround_modifier.modifiers.scale_distillation import ScaleDistillationModifier
from autoround_modifier.recipe_files import find_recipe, modifiers_of, read_recipe, replace_fields
from autoround_modifier.recipes import check_recipe
from autoround_modifier.schemes.options import named_scheme

__all__ = ["compose_recipe"]

Fields = Mapping[str, Any]


def compose_recipe(
    base: str | Path | None = None,
    auto_round: Fields | None = None,
    auto_scheme: Fields | None = None,
    distillation: Fields | None = None,
    settings: Iterable[str] = (),
) -> str:
    """
    :param base: path, or name of a shipped recipe, to start from; None for one `AutoRoundModifier`
        that ignores ``lm_head``
    :param auto_round: fields of `AutoRoundModifier`; ``scheme`` may also be a name with a group
        size, such as ``W2A16G64``
    :param auto_scheme: fields of `AutoSchemeModifier`, which is put first where the recipe has none
    :param distillation: fields of `ScaleDistillationModifier`, which is put last where the recipe
        has none; None for none
    :param settings: ``path.to.field=value``, where the path begins with the name of a modifier or
        at the top of the recipe, and the value is YAML
    :return: the recipe, YAML
    :raises RecipeError: if it is not sound
    :raises SchemeError: if there is no such scheme
    """
    content: dict[str, Any] = {"quant_stage": {"quant_modifiers": {}}}
    source = "recipe of these flags"
    if base is not None:
        path = find_recipe(base)
        text = read_recipe(path)
        check_recipe(text, str(path))
        content, source = yaml.safe_load(text), f"{path} with these flags"
    fields = dict(auto_round or {})
    bodies = _bodies(content, AutoRoundModifier.__name__)
    if base is None:
        body: dict[str, Any] = {"ignore": ["lm_head"]}
        _first_group(content)[AutoRoundModifier.__name__] = body
        bodies = [body]
    if fields and not bodies:
        raise RecipeError(f"{base} has no AutoRoundModifier whose fields could be replaced")
    for body in bodies:
        replace_fields(body, _with_group_size(fields))
    if auto_scheme:
        _set(content, AutoSchemeModifier.__name__, auto_scheme, first=True)
    if distillation is not None:
        _set(content, ScaleDistillationModifier.__name__, distillation, first=False)
    for setting in settings:
        _apply(content, setting)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=88)
    check_recipe(text, source)
    return text


def _bodies(content: dict[str, Any], modifier: str) -> list[dict[str, Any]]:
    """:return: the fields of each modifier of that name"""
    return [body for name, body in modifiers_of(content) if name == modifier]


def _first_group(content: dict[str, Any]) -> dict[str, Any]:
    return next(iter(next(iter(content.values())).values()))


def _with_group_size(fields: dict[str, Any]) -> dict[str, Any]:
    """:return: the same, with a scheme that compressed-tensors does not name spelled out"""
    scheme = fields.get("scheme")
    if not isinstance(scheme, str) or is_preset_scheme(scheme) or gguf_scheme(scheme):
        return fields
    others = {name: value for name, value in fields.items() if name not in ("scheme", "targets")}
    group = named_scheme(scheme).model_dump(mode="json", exclude_unset=True, exclude_none=True)
    group["targets"] = fields.get("targets") or ["Linear"]
    return {**others, "config_groups": {"group_0": group}}


def _set(content: dict[str, Any], modifier: str, fields: Fields, first: bool) -> None:
    bodies = _bodies(content, modifier)
    for body in bodies:
        body.update(fields)
    if not bodies:
        group = _first_group(content)
        others = dict(group)
        group.clear()
        new = {modifier: dict(fields)}
        group.update({**new, **others} if first else {**others, **new})


def _apply(content: dict[str, Any], setting: str) -> None:
    """
    :param setting: ``path.to.field=value``
    :raises RecipeError: if there is no such path
    """
    path, equals, text = setting.partition("=")
    *parents, last = path.split(".")
    if not equals or not parents:
        raise RecipeError(f"`{setting}` is not of the form `Modifier.field=value`")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"`{setting}`: the value is not YAML: {error}") from error
    places = _bodies(content, parents[0]) or [content]
    names = parents[1:] if places != [content] else parents
    for place in places:
        for name in names:
            step = place.get(name) if isinstance(place, dict) else None
            if not isinstance(step, dict):
                known = ", ".join(place) if isinstance(place, dict) else "a value"
                raise RecipeError(f"`{setting}`: there is no `{name}`; there is {known}")
            place = step
        place[last] = value
