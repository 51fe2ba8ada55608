"""Trains the scales of a quantized model against the distribution of its original."""

from autoround_modifier.distillation.distiller import (
    DistillationConfig,
    DistillationResult,
    train_scales,
)
from autoround_modifier.distillation.scales import TrainedScale
from autoround_modifier.distillation.teacher import TeacherBatch, record_teacher
from autoround_modifier.distillation.trainable import trainable_layers, trainable_norms

__all__ = [
    "DistillationConfig",
    "DistillationResult",
    "TeacherBatch",
    "TrainedScale",
    "record_teacher",
    "train_scales",
    "trainable_layers",
    "trainable_norms",
]
