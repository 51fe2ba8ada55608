"""The original's next-token distribution on calibration data, small enough to keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoround_modifier.blocks.model_pass import (
    POSITIONS,
    counting_positions,
    forward_arguments,
    model_logits,
)
from autoround_modifier.errors import CalibrationError, NonFiniteError

__all__ = ["TeacherBatch", "divergence", "record_teacher"]

# Likeliest tokens kept for each position. The rest of the vocabulary counts as one more outcome.
TOP_K = 256


@dataclass
class TeacherBatch:
    """
    One calibration batch and what the original predicts on it.

    :param inputs: arguments of the model's forward
    :param tokens: (positions, k) int32, the likeliest next tokens
    :param log_probs: (positions, k) float32, their log-probabilities
    :param mask: (batch, length) bool, the positions that count, `positions` in number; None if all
    """

    inputs: dict[str, Any]
    tokens: Tensor
    log_probs: Tensor
    mask: Tensor | None

    @property
    def num_positions(self) -> int:
        return self.tokens.shape[0]


@torch.no_grad()
def record_teacher(model: nn.Module, batches: Iterable[dict[str, Any]]) -> list[TeacherBatch]:
    """
    :param model: the original, in full precision
    :param batches: arguments of its forward; ``attention_mask`` and ``loss_mask``, (batch, length),
        say which positions count
    :raises CalibrationError: if no position counts
    :raises NonFiniteError: if the original gives NaN or infinity
    """
    recorded = []
    for index, batch in enumerate(batches):
        inputs = forward_arguments(batch)
        logits = model_logits(model, inputs)
        mask = counting_positions(batch, logits.shape[:2])
        rows = logits[mask.to(logits.device)] if mask is not None else logits.flatten(0, 1)
        if not torch.isfinite(rows).all():
            raise NonFiniteError(
                f"the original's output has NaN or infinity in calibration batch {index}; load the "
                "model in bfloat16 or float32"
            )
        if not len(rows):
            continue
        tokens, log_probs = [], []
        for part in rows.split(POSITIONS):
            top = F.log_softmax(part.float(), dim=-1).topk(min(TOP_K, part.shape[-1]))
            tokens.append(top.indices.int().cpu())
            log_probs.append(top.values.cpu())
        recorded.append(TeacherBatch(inputs, torch.cat(tokens), torch.cat(log_probs), mask))
    if not recorded:
        raise CalibrationError("the calibration data has no token that counts")
    return recorded


def divergence(logits: Tensor, teacher: TeacherBatch, scale: float | None = None) -> Tensor:
    """
    Kullback-Leibler divergence of the student from the teacher, where the tokens that were not
    kept are one outcome: a lower bound of that over the whole vocabulary.

    :param logits: (batch, length, vocabulary), the student's
    :param teacher: what the original predicts
    :param scale: if given, the gradient of ``scale`` times the divergence goes back through
        ``logits``
    :return: sum over the positions that count, float32 scalar, without a graph
    """
    mask = teacher.mask
    rows = logits[mask.to(logits.device)] if mask is not None else logits.flatten(0, 1)
    gradient = None if scale is None else torch.empty_like(rows)
    total = torch.zeros((), device=rows.device)
    for start in range(0, len(rows), POSITIONS):
        part = slice(start, start + POSITIONS)
        # A leaf for each part: only one part's logits and their gradients are in float32 at a time.
        leaf = rows[part].detach().float().requires_grad_(scale is not None)
        tokens = teacher.tokens[part].long().to(rows.device)
        loss = _kept_divergence(leaf, tokens, teacher.log_probs[part].to(rows.device))
        if gradient is not None and scale is not None:
            (loss * scale).backward()
            gradient[part] = cast(Tensor, leaf.grad)
        total += loss.detach()
    if gradient is not None:
        rows.backward(gradient)
    return total


def _kept_divergence(logits: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
    """
    :param logits: (positions, vocabulary), float32
    :param tokens: (positions, k), int64
    :param log_probs: (positions, k), the teacher's
    """
    student = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    kept = (log_probs.exp() * (log_probs - student)).sum()
    if tokens.shape[-1] == logits.shape[-1]:
        return kept
    rest, student_rest = (
        (1 - values.exp().sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
        for values in (log_probs, student)
    )
    return kept + (rest * (rest / student_rest).log()).sum()
