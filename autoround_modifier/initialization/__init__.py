"""The scale search that runs before tuning, or instead of it."""

from autoround_modifier.initialization.search import search_range

__all__ = ["search_range"]
