"""Quantized activations: inputs of linear layers, and the key-value cache."""

from autoround_modifier.activations.functional import fake_quantize_in_range
from autoround_modifier.activations.quantizer import (
    ActivationQuantizer,
    activation_quantizers,
    calibrate_remaining,
)
from autoround_modifier.activations.statistics import DEFAULT_OBSERVER
from autoround_modifier.activations.support import (
    needs_calibration,
    unsupported_activations,
    unsupported_kv_cache,
)

__all__ = [
    "DEFAULT_OBSERVER",
    "ActivationQuantizer",
    "activation_quantizers",
    "calibrate_remaining",
    "fake_quantize_in_range",
    "needs_calibration",
    "unsupported_activations",
    "unsupported_kv_cache",
]
