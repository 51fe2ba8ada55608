"""From tuned weights to what the checkpoint holds."""

from autoround_modifier.export.write_back import write_back

__all__ = ["write_back"]
