"""Numeric formats: specifications, grids, the tuned state of a weight, and its quantized parts."""

from autoround_modifier.formats.floating import FloatGrid, MicroscalingGrid, NVFP4Grid
from autoround_modifier.formats.grid import Grid, ScaledGrid
from autoround_modifier.formats.grouping import Grouping
from autoround_modifier.formats.integer import IntegerGrid
from autoround_modifier.formats.quantized_weight import QuantizedWeight
from autoround_modifier.formats.spec import FormatSpec, WeightSpec
from autoround_modifier.formats.super_block import SuperBlockGrid, SuperBlockSpec
from autoround_modifier.formats.tuned_weight import TunedWeight

__all__ = [
    "FloatGrid",
    "FormatSpec",
    "Grid",
    "Grouping",
    "IntegerGrid",
    "MicroscalingGrid",
    "NVFP4Grid",
    "QuantizedWeight",
    "ScaledGrid",
    "SuperBlockGrid",
    "SuperBlockSpec",
    "TunedWeight",
    "WeightSpec",
]
