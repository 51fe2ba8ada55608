"""From tuned weights to what the checkpoint holds."""

from autoround_modifier.export.saved_format import choose_saved_format
from autoround_modifier.export.write_back import write_back

__all__ = ["choose_saved_format", "write_back"]
