"""What is decided before tuning, or instead of it: clipping ranges and shared scales."""

from autoround_modifier.initialization.search import search_range
from autoround_modifier.initialization.shared_scale import (
    fused_layers,
    shared_global_scale,
    shared_range,
)

__all__ = ["fused_layers", "search_range", "shared_global_scale", "shared_range"]
