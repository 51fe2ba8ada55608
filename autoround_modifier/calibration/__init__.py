"""Where calibration text comes from."""

from autoround_modifier.calibration.generated import self_generated
from autoround_modifier.calibration.text import text_dataset

__all__ = ["self_generated", "text_dataset"]
