"""Loads recipes, and checks a recipe file before it runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from autoround_modifier.errors import RecipeError
from autoround_modifier.host.lifecycle import Modifier, Recipe, known_modifiers
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.registration import OWN_MODIFIERS
from autoround_modifier.recipe_files import find_recipe, modifiers_of, read_recipe, replace_fields

__all__ = ["check_recipe", "load_recipe"]


def load_recipe(recipe: str | Path, **fields: Any) -> Recipe:
    """
    A recipe with some fields of its `AutoRoundModifier` replaced, for `oneshot`:
    ``load_recipe("w2a16_autoround", preset="light")``.

    :param recipe: a path, or the name of a shipped recipe
    :param fields: fields of `AutoRoundModifier`, by name
    :raises RecipeError: if the recipe is not found or is not sound, or would not be with these
        fields
    """
    path = find_recipe(recipe)
    text = read_recipe(path)
    check_recipe(text, str(path))
    content = yaml.safe_load(text)
    bodies = [body for name, body in modifiers_of(content) if name == AutoRoundModifier.__name__]
    if not bodies:
        raise RecipeError(f"{path}: has no AutoRoundModifier whose fields could be replaced")
    for body in bodies:
        replace_fields(body, fields)
        _check_fields(f"{path}, with {', '.join(fields)} replaced", AutoRoundModifier, body)
    return Recipe.from_dict(content)


def check_recipe(text: str, source: str) -> None:
    """
    Refuse what LLM-Compressor would read as an empty recipe or fail on without saying where.

    :param text: the recipe, YAML
    :param source: its file, for error messages
    :raises RecipeError: with the file and the line
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_keys(source, root)
        modifiers = list(_modifiers(source, root))
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    if not modifiers:
        raise RecipeError(f"{source}: no modifiers; {_LAYOUT}")
    known = known_modifiers()
    for line, name, body in modifiers:
        place = f"{source}:{line}"
        if name not in known:
            raise RecipeError(f"{place}: no modifier is named `{name}`{_nearest(name, known)}")
        if not isinstance(body, dict):
            raise RecipeError(f"{place}: `{name}` has no fields; write `{name}: {{}}`")
        if name in OWN_MODIFIERS:
            _check_fields(place, OWN_MODIFIERS[name], body)


def _check_fields(place: str, modifier: type[Modifier], body: dict[Any, Any]) -> None:
    """
    :param place: of the fields, for messages
    :raises RecipeError: if a modifier cannot be made of the fields
    """
    name = modifier.__name__
    for field in body:
        if not isinstance(field, str):
            raise RecipeError(f"{place}: `{name}`: {field!r} is not the name of a field")
    try:
        modifier(**body)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            field = ".".join(map(str, item["loc"]))
            hint = ""
            if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
                hint = _nearest(field, modifier.model_fields)
            problems.append(f"{field}: {item['msg']}{hint}" if field else item["msg"])
        raise RecipeError(f"{place}: `{name}`: {'; '.join(problems)}") from error


def _nearest(name: str, known: Iterable[str]) -> str:
    """:return: the end of a message: which known names are nearest"""
    near = [f"`{x}`" for x in difflib.get_close_matches(name, list(known), n=2)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


_LAYOUT = (
    "a recipe is `<name>_stage:`, in it `<name>_modifiers:`, in it `<Modifier>: {fields}`; "
    "other keys are ignored by LLM-Compressor"
)


def _modifiers(source: str, root: yaml.Node | None) -> Iterator[tuple[int, str, Any]]:
    """Yield (line, modifier name, fields) for each modifier of a recipe."""
    for stage_key, stage in _items(root):
        if not stage_key.value.endswith("_stage"):
            raise RecipeError(
                f"{source}:{_line(stage_key)}: `{stage_key.value}` is not a stage: {_LAYOUT}"
            )
        for group_key, group in _items(stage):
            if not group_key.value.endswith("_modifiers"):
                raise RecipeError(
                    f"{source}:{_line(group_key)}: `{group_key.value}` is not a group of "
                    f"modifiers: {_LAYOUT}"
                )
            for key, value in _items(group):
                yield _line(key), key.value, _construct(value)


def _check_keys(source: str, root: yaml.Node | None) -> None:
    """
    YAML takes the last of two equal keys, and Python cannot have a list as a key.

    :raises RecipeError: with the line of a key that is not a scalar, or that is there twice
    """
    nodes, seen = [] if root is None else [root], set()
    for node in nodes:  # which grows
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        keys: set[str] = set()
        for key, value in _items(node):
            place = f"{source}:{_line(key)}"
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(
                    f"{place}: a list or mapping is used as a key; keys must be strings"
                )
            if key.value in keys:
                raise RecipeError(
                    f"{place}: a second `{key.value}` would replace the first"
                    + ("; put it into a group of its own" if _is_modifier(key.value) else "")
                )
            keys.add(key.value)
            nodes.append(value)
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value


def _is_modifier(key: str) -> bool:
    return key.endswith("Modifier")


def _items(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _construct(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    return loader.construct_object(node, deep=True)
