"""What the blocks saw during calibration, and where calibration text comes from."""

from autoround_modifier.calibration.capture import BlockCapture, CapturedBlock, ImportanceCapture
from autoround_modifier.calibration.generated import self_generated
from autoround_modifier.calibration.samples import BlockCall
from autoround_modifier.calibration.text import text_dataset

__all__ = [
    "BlockCall",
    "BlockCapture",
    "CapturedBlock",
    "ImportanceCapture",
    "self_generated",
    "text_dataset",
]
