"""
The fields of the modifiers, as pydantic models that need no PyTorch: the command line makes its
flags of them.
"""

from autoround_modifier.fields.auto_scheme import AutoSchemeFields
from autoround_modifier.fields.distillation import DistillationFields
from autoround_modifier.fields.schemes import ENGINES, Engine, SchemeFields
from autoround_modifier.fields.tuning import TuningFields

__all__ = [
    "ENGINES",
    "AutoSchemeFields",
    "DistillationFields",
    "Engine",
    "SchemeFields",
    "TuningFields",
]
