"""Model hubs, Hugging Face and ModelScope: where models come from and checkpoints go."""

from autoround_modifier.hub.download import resolve_model
from autoround_modifier.hub.platform import PLATFORMS, Platform, chosen_platform

__all__ = ["PLATFORMS", "Platform", "chosen_platform", "resolve_model"]
