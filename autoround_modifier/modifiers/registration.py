"""The modifiers of this package; importing this registers them with LLM-Compressor."""

from __future__ import annotations

from autoround_modifier.host.lifecycle import Modifier, register_modifier
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.auto_scheme import AutoSchemeModifier
from autoround_modifier.modifiers.scale_distillation import ScaleDistillationModifier

__all__ = ["OWN_MODIFIERS"]

OWN_MODIFIERS: dict[str, type[Modifier]] = {
    modifier.__name__: modifier
    for modifier in (AutoSchemeModifier, AutoRoundModifier, ScaleDistillationModifier)
}
for _modifier in OWN_MODIFIERS.values():
    register_modifier(_modifier)
