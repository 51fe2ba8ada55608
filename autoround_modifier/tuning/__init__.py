"""Learns how the weights of a group of blocks round."""

from autoround_modifier.tuning.sampling import SampleShare
from autoround_modifier.tuning.tuner import Tuner, TuningConfig, TuningResult, num_tokens

__all__ = ["SampleShare", "Tuner", "TuningConfig", "TuningResult", "num_tokens"]
