"""The recipes that the package ships: their files, and what their text says. Without PyTorch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autoround_modifier.errors import RecipeError, SchemeError
from autoround_modifier.presets import PRESET_FIELDS
from autoround_modifier.scheme_names import group_named

__all__ = [
    "RecipeSummary",
    "find_recipe",
    "list_recipes",
    "modifiers_of",
    "new_recipe",
    "read_recipe",
    "recipe_name",
    "replace_fields",
    "summarize_recipe",
]

_PACKAGE = Path(__file__).parent
# A wheel carries the recipes inside the package; in a checkout they are beside it.
_INSTALLED = _PACKAGE / "shipped_recipes"
_FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "recipes"
CONFIG_GROUPS = "config_groups"


@dataclass(frozen=True)
class RecipeSummary:
    """
    :param name: of the file, without its ending
    :param description: first sentence of the comment at the top
    :param groups: config groups that the layers get, or of which `AutoSchemeModifier` chooses
    :param avg_bits: budget of `AutoSchemeModifier`, in bits per weight; None without it
    :param kv_cache: whether the key-value cache is quantized
    """

    name: str
    description: str
    groups: tuple[dict[str, Any], ...]
    avg_bits: float | None
    kv_cache: bool


def list_recipes() -> dict[str, Path]:
    """:return: name without ending -> path of every shipped recipe"""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """
    :param recipe: a path, or the name of a shipped recipe with or without ``.yaml``
    :return: path of the recipe file
    :raises RecipeError: if there is neither; lists the shipped names
    """
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = list_recipes()
    if path.name == str(recipe) and path.stem in shipped and path.suffix in ("", ".yaml"):
        return shipped[path.stem]
    near = difflib.get_close_matches(path.stem, shipped, n=2)
    hint = f"; did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""
    raise RecipeError(
        f"no file `{recipe}`, and no shipped recipe of that name{hint or ';'} shipped are: "
        f"{', '.join(sorted(shipped))}"
    )


def read_recipe(path: Path) -> str:
    """
    :param path: of a recipe file
    :return: its text
    :raises RecipeError: if it is not UTF-8
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text, so no recipe: {error}") from error


def recipe_name(recipe: object) -> str | None:
    """
    :param recipe: as in `oneshot`
    :return: what a report calls it: the name of a shipped recipe or of a file, without ending; None
        for YAML text and objects
    """
    if not isinstance(recipe, (str, Path)) or "\n" in str(recipe):
        return None
    return Path(recipe).stem


def summarize_recipe(path: Path) -> RecipeSummary:
    """
    :param path: of a recipe file
    :raises RecipeError: if it is no YAML, or names a scheme that is not known
    """
    text = read_recipe(path)
    try:
        content = yaml.safe_load(text)
        bodies = [body for _, body in modifiers_of(content)]
        groups = tuple(group for body in bodies for group in _groups(body))
    except (yaml.YAMLError, SchemeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    budgets = [float(body["avg_bits"]) for body in bodies if "avg_bits" in body]
    return RecipeSummary(
        path.stem,
        _description(text),
        groups,
        budgets[0] if budgets else None,
        any(body.get("kv_cache_scheme") for body in bodies),
    )


def new_recipe(source: str) -> str:
    """
    :param source: path or name of a recipe
    :return: its text with a comment on how it is run, to be changed
    :raises RecipeError: if there is no such recipe
    """
    path = find_recipe(source)
    text = read_recipe(path)
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:start])
    kept = [x.strip("\n") for x in comment.split("\n\n") if not x.lstrip().startswith("oneshot(")]
    header = "\n\n".join([f"Made from {path.stem}.", *(x for x in kept if x), GUIDE])
    commented = [f"# {line}".rstrip() for line in header.splitlines()]
    return "\n".join([*commented, *lines[start:]]) + "\n"


# The fields that are changed most, for `new_recipe`
GUIDE = """\
Run it:

    autoround-modifier quantize MODEL --recipe THIS_FILE --output FOLDER

`preset`: best (1000 steps for each block), default (200), light (50), opt_rtn (scales are
    searched, nothing is tuned), rtn (rounding alone). Single settings can be given instead:
    `iters`, `num_calibration_samples`, `lr`, `loss`, `scale_search`.
`ignore`: layers that stay in 16 bits, by name, or by an expression after `re:`.
`scheme`: one preset for all layers (`autoround-modifier schemes` lists them); or `config_groups`,
    which spells schemes out, for layers that are named in `targets`. Layers that engines fuse
    (q/k/v, gate/up) need one scheme.
`engine`: what the checkpoint must load in: any (each engine, the default), vllm, transformers."""


def modifiers_of(recipe: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    :param recipe: content of its YAML: stages, in them groups, in them modifiers
    :return: name and fields of each modifier, in their order; what is no recipe has none
    """
    for stage in recipe.values() if isinstance(recipe, dict) else ():
        for group in stage.values() if isinstance(stage, dict) else ():
            for name, fields in group.items() if isinstance(group, dict) else ():
                yield str(name), fields if isinstance(fields, dict) else {}


def replace_fields(body: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """
    :param body: fields of an `AutoRoundModifier` in a recipe, which are changed
    :param fields: that take the place of those, and of what a preset or a scheme stands for
    """
    if "preset" in fields:  # a saved recipe spells out what its preset stood for
        for name in PRESET_FIELDS:
            body.pop(name, None)
    if "scheme" in fields or CONFIG_GROUPS in fields:
        for name in ("scheme", CONFIG_GROUPS):
            body.pop(name, None)
    body.update(fields)


def _groups(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the config groups of the fields of a modifier."""
    scheme = body.get("scheme")
    if isinstance(scheme, str):
        yield {**group_named(scheme), "targets": body.get("targets") or ["Linear"]}
    elif isinstance(scheme, Mapping):
        for name, targets in scheme.items():
            yield {**group_named(str(name)), "targets": targets}
    for group in (body.get(CONFIG_GROUPS) or {}).values():
        yield dict(group)
    for option in body.get("options") or ():
        yield group_named(option) if isinstance(option, str) else dict(option)


def _description(text: str) -> str:
    """:return: the first sentence of the comment at the top"""
    comment = []
    for line in text.splitlines():
        if line.strip("# ") == "" or not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].rstrip(".")
