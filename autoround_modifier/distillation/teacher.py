"""The original's next-token distribution on calibration data, small enough to keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from autoround_modifier.blocks.model_pass import (
    counting_positions,
    forward_arguments,
    model_logits,
)
from autoround_modifier.distillation.stacking import stacks
from autoround_modifier.errors import CalibrationError, NonFiniteError

__all__ = ["TeacherBatch", "divergence", "record_teacher"]

# Logits in float32 at a time: on a CPU they then stay in its cache.
CPU_LOGITS = 2**22
ACCELERATOR_LOGITS = 2**26
# Likeliest tokens kept for each position. The rest of the vocabulary counts as one more outcome.
TOP_K = 256


@dataclass
class TeacherBatch:
    """
    One calibration batch and what the original predicts on it.

    :param inputs: arguments of the model's forward
    :param tokens: (positions, k) int32, the likeliest next tokens
    :param log_probs: (positions, k) float32, their log-probabilities
    :param mask: (batch, recorded) bool, which of the recorded positions count; None if all
    :param recorded: int64, the positions of each sample that were recorded; None if all
    """

    inputs: dict[str, Any]
    tokens: Tensor
    log_probs: Tensor
    mask: Tensor | None
    recorded: Tensor | None = None

    @property
    def num_positions(self) -> int:
        return self.tokens.shape[0]


@torch.no_grad()
def record_teacher(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    position_fraction: float = 1.0,
    at_once: int = 1,
) -> list[TeacherBatch]:
    """
    :param model: the original, in full precision
    :param batches: arguments of its forward; ``attention_mask`` and ``loss_mask``, (batch, length),
        say which positions count
    :param position_fraction: share of the positions that are recorded, evenly spaced
    :param at_once: number of batches that the model runs on together, where they have one shape
    :raises CalibrationError: if no position counts
    :raises NonFiniteError: if the original gives NaN or infinity
    """
    recorded: dict[int, TeacherBatch | None] = {}
    rest, start = iter(batches), 0
    while group := list(islice(rest, at_once)):
        inputs = [forward_arguments(batch) for batch in group]
        for indices, joined in stacks(inputs):
            positions = None
            if "input_ids" in joined:
                positions = evenly_spaced(joined["input_ids"].shape[1], position_fraction)
            logits = model_logits(model, joined, positions)
            for index, part in zip(indices, logits.chunk(len(indices)), strict=True):
                recorded[start + index] = _recorded(
                    group[index], inputs[index], part, positions, start + index
                )
        start += len(group)
    found = [recorded[index] for index in sorted(recorded)]
    result = [batch for batch in found if batch is not None]
    if not result:
        raise CalibrationError("the calibration data has no token that counts")
    return result


def _recorded(
    batch: dict[str, Any],
    inputs: dict[str, Any],
    logits: Tensor,
    positions: Tensor | None,
    index: int,
) -> TeacherBatch | None:
    """
    :param logits: (batch, positions, vocabulary), the original's
    :param positions: of the samples that these are of; None for all
    :param index: of the batch, for messages
    :return: what is kept; None if no position counts
    """
    shape = batch["input_ids"].shape[:2] if "input_ids" in batch else logits.shape[:2]
    mask = counting_positions(batch, shape)
    if mask is not None and positions is not None:
        mask = mask[:, positions]
    rows = logits[mask.to(logits.device)] if mask is not None else logits.flatten(0, 1)
    if not torch.isfinite(rows).all():
        raise NonFiniteError(
            f"the original's output has NaN or infinity in calibration batch {index}; load the "
            "model in bfloat16 or float32"
        )
    if not len(rows):
        return None
    tokens, log_probs = [], []
    for part in rows.split(_rows_at_once(rows)):
        top = part.topk(min(TOP_K, part.shape[-1]))
        tokens.append(top.indices.int().cpu())
        norm = part.float().logsumexp(-1, keepdim=True)
        log_probs.append((top.values.float() - norm).cpu())
    return TeacherBatch(inputs, torch.cat(tokens), torch.cat(log_probs), mask, positions)


def evenly_spaced(length: int, fraction: float) -> Tensor | None:
    """
    :param length: number of positions, >= 1
    :param fraction: of them, in (0, 1]
    :return: indices, int64; None for all positions
    """
    count = max(1, round(length * fraction))
    if count >= length:
        return None
    return ((torch.arange(count) + 0.5) * (length / count)).long()


def divergence(logits: Tensor, teacher: TeacherBatch, scale: float | None = None) -> Tensor:
    """
    Kullback-Leibler divergence of the student from the teacher, where the tokens that were not
    kept are one outcome: a lower bound of that over the whole vocabulary.

    :param logits: (batch, positions, vocabulary), the student's
    :param teacher: what the original predicts
    :param scale: if given, the gradient of ``scale`` times the divergence goes back through
        ``logits``
    :return: sum over the positions that count, float32 scalar, without a graph
    """
    mask = teacher.mask
    rows = logits[mask.to(logits.device)] if mask is not None else logits.flatten(0, 1)
    gradient = None if scale is None else torch.empty_like(rows)
    total = torch.zeros((), device=rows.device)
    size = _rows_at_once(rows)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        tokens = teacher.tokens[part].long().to(rows.device)
        log_probs = teacher.log_probs[part].to(rows.device)
        loss, by_logits = _kept_divergence(rows[part].detach(), tokens, log_probs, scale)
        if gradient is not None and by_logits is not None:
            gradient[part] = by_logits
        total += loss
    if gradient is not None:
        rows.backward(gradient)
    return total


def _rows_at_once(logits: Tensor) -> int:
    """
    :param logits: (positions, vocabulary)
    :return: number of positions whose logits are in float32 at the same time
    """
    numbers = CPU_LOGITS if logits.device.type == "cpu" else ACCELERATOR_LOGITS
    return max(1, numbers // logits.shape[-1])


@torch.no_grad()
def _kept_divergence(
    logits: Tensor, tokens: Tensor, log_probs: Tensor, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """
    With p and q the distributions of teacher and student, and r and s what each gives to the tokens
    that are not kept, the gradient by a logit is ``q - p`` for tokens that are kept, and
    ``q (1 - r / s)`` for the others. Autograd would take several passes over the vocabulary more.

    :param logits: (positions, vocabulary)
    :param tokens: (positions, k), int64
    :param log_probs: (positions, k), the teacher's
    :param scale: factor of the gradient; None for no gradient
    :return: the divergence, scalar, and its gradient, float32, of the shape of ``logits``
    """
    powers = logits.to(torch.float32, copy=True)
    largest = powers.amax(-1, keepdim=True)
    kept_logits = powers.gather(-1, tokens)
    powers.sub_(largest).exp_()
    total = powers.sum(-1, keepdim=True)
    student = kept_logits - largest - total.log()
    p, q = log_probs.exp(), student.exp()
    divergence = (p * (log_probs - student)).sum()
    ratio = torch.ones_like(total)
    if tokens.shape[-1] < logits.shape[-1]:
        rest, student_rest = (
            (1 - kept.sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps)
            for kept in (p, q)
        )
        ratio = rest / student_rest
        divergence = divergence + (rest * ratio.log()).sum()
    if scale is None:
        return divergence, None
    gradient = powers.mul_(scale * (1 - ratio) / total)
    return divergence, gradient.scatter_(-1, tokens, scale * (q - p))
