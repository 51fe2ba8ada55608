"""Where calibration samples come from, and which are refused."""

from autoround_modifier.calibration.batches import PaddedBatch, sample_batches
from autoround_modifier.calibration.checks import check_loss_masks, check_samples, model_columns
from autoround_modifier.calibration.generated import self_generated
from autoround_modifier.calibration.sources import HubAccess
from autoround_modifier.calibration.text import (
    check_text_name,
    is_text_source,
    read_samples,
    text_dataset,
)

__all__ = [
    "HubAccess",
    "PaddedBatch",
    "check_loss_masks",
    "check_samples",
    "check_text_name",
    "is_text_source",
    "model_columns",
    "read_samples",
    "sample_batches",
    "self_generated",
    "text_dataset",
]
