"""How a recipe that was run rounded weights, read from its YAML alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from autoround_modifier.errors import CheckpointError
from autoround_modifier.presets import PRESETS, Preset
from autoround_modifier.recipe_files import modifiers_of

__all__ = ["RoundingMethod", "rounding_method"]


@dataclass(frozen=True)
class RoundingMethod:
    """
    :param modifiers: names, in the order in which they ran
    :param iters: steps of SignRound for each block; None without an AutoRoundModifier
    :param scale_search: whether scales were searched before tuning (SignRoundV2)
    :param samples: largest number of samples that it tuned on; None where it tuned nothing
    """

    modifiers: tuple[str, ...]
    iters: int | None = None
    scale_search: bool = False
    samples: int | None = None

    @property
    def text(self) -> str:
        """The end of a sentence that begins "was quantized by"."""
        if self.iters is None:
            return " and ".join(self.modifiers)
        if self.iters:
            return f"SignRound in {self.iters} iterations per block"
        if self.scale_search:
            return "rounding to nearest with searched scales"
        return "rounding to nearest"


def rounding_method(recipe: str) -> RoundingMethod:
    """
    :param recipe: YAML
    :raises CheckpointError: if it is not a recipe
    """
    try:
        content = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        raise CheckpointError(f"the recipe in the report is not valid YAML: {error}") from error
    bodies = list(modifiers_of(content))
    if not bodies:
        raise CheckpointError("the recipe in the report has no modifiers")
    names = tuple(name for name, _ in bodies)
    for name, body in bodies:
        if name == "AutoRoundModifier":
            preset = PRESETS.get(body.get("preset", "default"), PRESETS["default"])
            iters = _value(body, "iters", preset)
            samples = _value(body, "num_calibration_samples", preset)
            return RoundingMethod(
                names, iters, _value(body, "scale_search", preset), samples if iters else None
            )
    return RoundingMethod(names)


def _value(body: Mapping[str, Any], field: str, preset: Preset) -> Any:
    given = body.get(field)
    return getattr(preset, field) if given is None else given
