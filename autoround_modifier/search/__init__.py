"""Where tuning starts: clipping ranges and scales that several layers share."""

from autoround_modifier.search.clipping_range import search_range
from autoround_modifier.search.shared_scale import shared_global_scale, shared_range

__all__ = ["search_range", "shared_global_scale", "shared_range"]
