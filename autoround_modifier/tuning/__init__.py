"""Learns how the weights of a group of blocks round."""

from autoround_modifier.tuning.block import BlockGroup, attention_for_tuning
from autoround_modifier.tuning.tuner import TuningConfig, TuningResult, tune

__all__ = ["BlockGroup", "TuningConfig", "TuningResult", "attention_for_tuning", "tune"]
