"""What a recipe as run did to weights, read from its YAML alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from autoround_modifier.errors import CheckpointError
from autoround_modifier.presets import PRESETS

__all__ = ["RunSettings", "run_settings"]


@dataclass(frozen=True)
class RunSettings:
    """
    :param modifiers: names, in the order in which they ran
    :param iters: steps of SignRound for each block; None without an AutoRoundModifier
    :param scale_search: whether scales were searched before tuning (SignRoundV2)
    """

    modifiers: tuple[str, ...]
    iters: int | None = None
    scale_search: bool = False

    @property
    def method(self) -> str:
        """How weights were rounded: the end of a sentence that begins "was quantized by"."""
        if self.iters is None:
            return " and ".join(self.modifiers)
        if self.iters:
            return f"SignRound in {self.iters} iterations per block"
        if self.scale_search:
            return "rounding to nearest with searched scales"
        return "rounding to nearest"


def run_settings(recipe: str) -> RunSettings:
    """
    :param recipe: YAML
    :raises CheckpointError: if it is not a recipe
    """
    try:
        content = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        raise CheckpointError(f"the recipe in the report is not valid YAML: {error}") from error
    bodies = list(_modifiers(content))
    if not bodies:
        raise CheckpointError("the recipe in the report has no modifiers")
    names = tuple(name for name, _ in bodies)
    for name, body in bodies:
        if name == "AutoRoundModifier":
            preset = PRESETS.get(body.get("preset", "default"), PRESETS["default"])
            iters, search = body.get("iters"), body.get("scale_search")
            return RunSettings(
                names,
                preset.iters if iters is None else iters,
                preset.scale_search if search is None else search,
            )
    return RunSettings(names)


def _modifiers(recipe: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """:return: name and fields of each modifier; a recipe is stages, groups, modifiers"""
    for stage in _values(recipe):
        for group in _values(stage):
            if isinstance(group, dict):
                for name, body in group.items():
                    yield str(name), body if isinstance(body, dict) else {}


def _values(mapping: Any) -> list[Any]:
    return list(mapping.values()) if isinstance(mapping, dict) else []
