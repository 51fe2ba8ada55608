"""Trains the scales of a quantized model against the distribution of its original."""

from autoround_modifier.distillation.distiller import (
    DistillationConfig,
    DistillationResult,
    train_scales,
)
from autoround_modifier.distillation.residency import weights_on_device
from autoround_modifier.distillation.teacher import TeacherBatch, record_teacher
from autoround_modifier.distillation.trainable import trainable_layers, trainable_norms

__all__ = [
    "DistillationConfig",
    "DistillationResult",
    "TeacherBatch",
    "record_teacher",
    "train_scales",
    "trainable_layers",
    "trainable_norms",
    "weights_on_device",
]
