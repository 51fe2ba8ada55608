"""Learns how the weights of a group of blocks round."""

from autoround_modifier.tuning.block import BlockGroup, attention_for_tuning
from autoround_modifier.tuning.sampling import SampleShare
from autoround_modifier.tuning.tuner import Tuner, TuningConfig, TuningResult, num_tokens

__all__ = [
    "BlockGroup",
    "SampleShare",
    "Tuner",
    "TuningConfig",
    "TuningResult",
    "attention_for_tuning",
    "num_tokens",
]
