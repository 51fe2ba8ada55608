"""
Which engine reads what of a checkpoint, told from names, shapes and ``config.json`` alone.

Nothing here knows LLM-Compressor or a session: what a recipe will save is checked before the run by
the same functions as a folder afterwards.
"""

from autoround_modifier.engines.check import (
    ENGINES,
    find_problems,
    required_engines,
    unreadable_experts,
)
from autoround_modifier.engines.layout import CheckpointLayout, TensorLayout
from autoround_modifier.engines.problem import Problem
from autoround_modifier.engines.vllm_loader import vllm_problems

__all__ = [
    "ENGINES",
    "CheckpointLayout",
    "Problem",
    "TensorLayout",
    "find_problems",
    "required_engines",
    "unreadable_experts",
    "vllm_problems",
]
