"""What can be written as a scheme: its size, engines that run it, recipes that use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from autoround_modifier.engines.answers import EngineSupport
from autoround_modifier.engines.layers import AlikeLayers
from autoround_modifier.engines.scheme import Scheme
from autoround_modifier.engines.support import find_support
from autoround_modifier.engines.tables import ENGINE_TABLES
from autoround_modifier.gguf_schemes import GGUF_SCHEMES, gguf_scheme
from autoround_modifier.recipe_files import RecipeSummary, list_recipes, summarize_recipe
from autoround_modifier.scheme_names import (
    ALIASES,
    SCHEMES,
    group_named,
    saved_bits_per_weight,
    saved_format,
)

__all__ = ["SchemeEntry", "describe_schemes", "scheme_names", "supports_of", "written_scheme"]

FOLDER = "FOLDER"
CACHE = "a quantized key-value cache is not exported"


@dataclass(frozen=True)
class SchemeEntry:
    """
    :param name: as it is written
    :param aliases: other names of it
    :param group: config group that it stands for, without targets
    :param scheme: the same, as engines see it
    :param bits_per_weight: as saved, of a layer of 4096 x 4096
    :param engines: what each engine makes of it, in a checkpoint that has no other scheme
    :param recipes: shipped recipes that use it
    """

    name: str
    aliases: tuple[str, ...]
    group: dict[str, Any]
    scheme: Scheme
    bits_per_weight: float
    engines: tuple[EngineSupport, ...]
    recipes: tuple[str, ...]


def scheme_names() -> list[str]:
    """:return: the names of all schemes, without aliases"""
    return [*(name for name in SCHEMES if name not in ALIASES), *GGUF_SCHEMES]


def describe_schemes(names: Iterable[str]) -> list[SchemeEntry]:
    """
    :param names: ``<preset>[_ASYM][G<group size>]``, in any case
    :raises SchemeError: if there is no scheme of such a name
    """
    summaries = [summarize_recipe(path) for path in list_recipes().values()]
    return [_entry(name, summaries) for name in names]


def written_scheme(group: dict[str, Any]) -> Scheme:
    """
    :param group: config group of a recipe, with ``weights``
    :return: the scheme of the layers in the checkpoint that is saved
    """
    scheme = Scheme.of_group(group, saved_format(group))
    assert scheme is not None
    return scheme


def supports_of(
    groups: Sequence[dict[str, Any]], single_group: bool | None = None, kv_cache: bool = False
) -> tuple[EngineSupport, ...]:
    """
    :param groups: config groups of a recipe, with ``weights``
    :param single_group: whether the checkpoint has one that targets ``Linear``; None looks
    :param kv_cache: whether the key-value cache is quantized
    :return: what each engine makes of the checkpoint, of a model without experts, whose layers have
        features in all multiples that kernels need
    """
    layers = [AlikeLayers(scheme) for scheme in dict.fromkeys(map(written_scheme, groups))]
    if single_group is None:
        single_group = len(groups) == 1 and "Linear" in groups[0].get("targets", ())
    formats = {format for table in ENGINE_TABLES for format in table.exports}
    return tuple(
        find_support(
            table,
            layers,
            FOLDER,
            single_group=single_group,
            exportable=dict.fromkeys(formats, CACHE) if kv_cache else None,
        )
        for table in ENGINE_TABLES
    )


def _entry(name: str, summaries: Iterable[RecipeSummary]) -> SchemeEntry:
    group, written = group_named(name), gguf_scheme(name) or name.upper()
    written = ALIASES.get(written, written)
    scheme = written_scheme(group)
    return SchemeEntry(
        written,
        tuple(alias for alias, of in ALIASES.items() if of == written),
        group,
        scheme,
        saved_bits_per_weight(group),
        supports_of([group], single_group=True),
        tuple(
            summary.name
            for summary in summaries
            if any(written_scheme(x) == scheme for x in summary.groups)
        ),
    )
