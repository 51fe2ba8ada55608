"""Chooses a scheme for each layer under a budget of bits: measure, keep, solve."""

from autoround_modifier.autoscheme.cache import ScoreCache, default_cache_folder
from autoround_modifier.autoscheme.measurement import Choice, MeasuredUnit, Measurement
from autoround_modifier.autoscheme.options import resolve_options
from autoround_modifier.autoscheme.scores import SCORES
from autoround_modifier.autoscheme.sensitivity import (
    SensitivityConfig,
    measure_sensitivity,
)
from autoround_modifier.autoscheme.size import saved_bits
from autoround_modifier.autoscheme.units import Unit, find_units

__all__ = [
    "SCORES",
    "Choice",
    "MeasuredUnit",
    "Measurement",
    "ScoreCache",
    "SensitivityConfig",
    "Unit",
    "default_cache_folder",
    "find_units",
    "measure_sensitivity",
    "resolve_options",
    "saved_bits",
]
