"""Trains the scales of a quantized model against the distribution of its original."""

from autoround_modifier.distillation.distiller import (
    DistillationConfig,
    DistillationResult,
    distill,
)
from autoround_modifier.distillation.scales import TrainedScale
from autoround_modifier.distillation.teacher import TeacherBatch, record_teacher

__all__ = [
    "DistillationConfig",
    "DistillationResult",
    "TeacherBatch",
    "TrainedScale",
    "distill",
    "record_teacher",
]
