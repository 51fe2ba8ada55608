"""
SignRound (AutoRound) as a native modifier of LLM-Compressor.

Importing this package registers `AutoRoundModifier` with LLM-Compressor, in place of the built-in
modifier of that name.
"""

from llmcompressor.modifiers import ModifierFactory

from autoround_modifier.auto_scheme import AutoSchemeModifier
from autoround_modifier.calibration import self_generated, text_dataset
from autoround_modifier.entrypoint import oneshot
from autoround_modifier.modifier import AutoRoundModifier
from autoround_modifier.presets import PRESETS
from autoround_modifier.recipes import find_recipe, list_recipes, load_recipe
from autoround_modifier.scale_distillation import ScaleDistillationModifier

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AutoRoundModifier",
    "AutoSchemeModifier",
    "ScaleDistillationModifier",
    "find_recipe",
    "list_recipes",
    "load_recipe",
    "oneshot",
    "self_generated",
    "text_dataset",
]

for _modifier in (AutoSchemeModifier, AutoRoundModifier, ScaleDistillationModifier):
    ModifierFactory.register(_modifier.__name__, _modifier)
