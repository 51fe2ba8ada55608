"""Quantized activations: inputs of linear layers, and the key-value cache."""

from autoround_modifier.activations.functional import fake_quantize_in_range
from autoround_modifier.activations.site import (
    DEFAULT_OBSERVER,
    ActivationSite,
    activation_sites,
)
from autoround_modifier.activations.support import (
    needs_calibration,
    unsupported_activations,
    unsupported_kv_cache,
)

__all__ = [
    "DEFAULT_OBSERVER",
    "ActivationSite",
    "activation_sites",
    "fake_quantize_in_range",
    "needs_calibration",
    "unsupported_activations",
    "unsupported_kv_cache",
]
