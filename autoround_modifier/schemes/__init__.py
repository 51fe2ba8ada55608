"""Chooses a scheme for each layer under a budget of bits: measure, keep the scores, solve."""

from autoround_modifier.schemes.choose import check_budget, choose_for_layers
from autoround_modifier.schemes.measurement import Choice, MeasuredUnit, Measurement
from autoround_modifier.schemes.options import resolve_options

__all__ = [
    "Choice",
    "MeasuredUnit",
    "Measurement",
    "check_budget",
    "choose_for_layers",
    "resolve_options",
]
