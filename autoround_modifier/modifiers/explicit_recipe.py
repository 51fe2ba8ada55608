"""The recipe that gives a chosen scheme to every layer, without choosing again."""

from __future__ import annotations

from typing import Any

import yaml

from autoround_modifier.host.lifecycle import Modifier
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.presets import PRESET_FIELDS, PRESETS
from autoround_modifier.schemes.measurement import Choice

__all__ = ["explicit_recipe"]


def explicit_recipe(choice: Choice, tuner: AutoRoundModifier, modifiers: list[Modifier]) -> str:
    """
    :param tuner: the modifier that took over the choice
    :param modifiers: of the recipe, without the AutoSchemeModifier
    :return: a recipe that gives the same schemes without a search, YAML
    """
    groups: dict[str, dict[str, Any]] = {}
    group = "quant_modifiers"
    for modifier in modifiers:
        name = type(modifier).__name__
        if name in groups.get(group, {}):  # a second one in a group would replace the first
            group = f"quant_{len(groups)}_modifiers"
        fields = modifier.model_dump(exclude_unset=True)
        for unwanted in ("group", "requires_calibration_data"):
            fields.pop(unwanted, None)
        if modifier is tuner:
            preset = PRESETS[tuner.preset]
            for field in PRESET_FIELDS:  # the preset implies these
                if fields.get(field) == getattr(preset, field):
                    del fields[field]
            fields["config_groups"] = choice.config_groups()
        fields = {k: v for k, v in fields.items() if v is not None and not k.endswith("_")}
        groups.setdefault(group, {})[name] = fields
    head = (
        f"# {choice.avg_bits():.4f} bits per weight, chosen from "
        f"{', '.join(choice.measurement.schemes)} by AutoSchemeModifier.\n"
    )
    return head + yaml.safe_dump({"quant_stage": groups}, sort_keys=False, width=100)
