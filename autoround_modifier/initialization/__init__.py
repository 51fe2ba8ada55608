"""What is decided before tuning, or instead of it: clipping ranges and global scales."""

from autoround_modifier.initialization.global_scale import shared_global_scales
from autoround_modifier.initialization.search import search_range

__all__ = ["search_range", "shared_global_scales"]
