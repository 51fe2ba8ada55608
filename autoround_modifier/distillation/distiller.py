"""
Trains the scales, and the gains of norms and all biases, end to end.

Each step draws calibration batches and lowers the divergence of the quantized model's next-token
distribution from the original's, by Adam with a cosine schedule. Training only the step sizes of a
model whose integers are fixed is phase two of EfficientQAT (https://arxiv.org/abs/2407.11062,
section 3.3), there against the text itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from autoround_modifier.blocks.model_pass import model_logits
from autoround_modifier.blocks.patching import forwards_replaced
from autoround_modifier.distillation.base import TrainedValue
from autoround_modifier.distillation.norms import TrainedNorm
from autoround_modifier.distillation.scales import TrainedScale
from autoround_modifier.distillation.stacking import stacks
from autoround_modifier.distillation.teacher import TeacherBatch, divergence
from autoround_modifier.errors import NonFiniteError
from autoround_modifier.host.layers import parameters_frozen
from autoround_modifier.host.lifecycle import eval_context
from autoround_modifier.tuning.sampling import minibatches, split_holdout

__all__ = ["DistillationConfig", "DistillationResult", "train_scales"]

# Gradients of one step are noisy: a short memory of their size, and a few steps to form it.
BETAS = (0.9, 0.95)
WARMUP = 4
# Adam does not see the size of gradients; this keeps those of float16 from underflow.
LOSS_SCALE = 1024.0
# Far below the squares of gradients of a mean divergence, which Adam would otherwise damp.
EPSILON = 1e-12


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of `train_scales`; the fields of `ScaleDistillationModifier` explain them."""

    iters: int = 50
    lr: float = 0.005
    norm_lr: float = 0.0025
    batch_size: int = 4
    gradient_checkpointing: bool = True
    holdout_fraction: float = 0.125
    seed: int = 42


@dataclass(frozen=True)
class DistillationResult:
    """
    :param judged_on: ``held-out samples``, or ``training samples`` where none could be set aside
    :param initial_kl: divergence per token on those samples before training, in nats
    :param final_kl: the same after it
    :param kept: whether the trained values are better, and so were kept
    :param moved: integers that could not be saved beside the new scale and moved by one step
    :param seconds: time spent
    """

    judged_on: str
    initial_kl: float
    final_kl: float
    kept: bool
    moved: int
    seconds: float


def train_scales(
    model: nn.Module,
    blocks: list[nn.Module],
    scales: list[TrainedScale],
    norms: list[tuple[nn.Module, str]],
    teacher: list[TeacherBatch],
    config: DistillationConfig,
    on_iteration: Callable[[], None] = lambda: None,
) -> DistillationResult:
    """
    :param model: the quantized model; changed in place, or left as it was if training did not help
    :param blocks: whose activations are computed again on the way back, to save memory
    :param scales: of the layers to train
    :param norms: gains and biases to train along: modules and the names of their parameters
    :param teacher: calibration batches with the original's predictions
    :param config: settings
    :param on_iteration: called after each step, for progress bars
    :raises NonFiniteError: if the quantized model gives NaN or infinity
    """
    started = time.perf_counter()
    train, holdout = split_holdout(len(teacher), config.holdout_fraction, config.seed)
    trained: list[tuple[Sequence[TrainedValue], float]] = [(scales, config.lr)]
    if config.norm_lr:
        trained.append(([TrainedNorm(*norm) for norm in norms], config.norm_lr))
    values = [value for group, _ in trained for value in group]

    def student(batch: TeacherBatch) -> Tensor:
        return model_logits(model, batch.inputs, batch.recorded)

    def holdout_kl() -> float:
        size = config.batch_size
        groups = [holdout[start : start + size] for start in range(0, len(holdout), size)]
        stacked = (x for group in groups for x in _stacked([teacher[i] for i in group]))
        with torch.no_grad():
            sums = [divergence(student(batch), batch) for batch in stacked]
        return float(torch.stack(sums).sum()) / sum(teacher[i].num_positions for i in holdout)

    with ExitStack() as stack:
        stack.enter_context(eval_context(model))
        stack.enter_context(parameters_frozen([model]))
        stack.enter_context(torch.enable_grad())
        for value in values:
            stack.enter_context(value.trained())
        optimizer = torch.optim.Adam(
            [{"params": [value.factor for value in group], "lr": lr} for group, lr in trained],
            betas=BETAS,
            eps=EPSILON,
        )
        schedule = LambdaLR(optimizer, lambda step: _schedule(step, config.iters))
        batches = minibatches(train, config.batch_size, config.seed)
        kept, moved = False, 0
        try:
            initial_kl = holdout_kl()
            if not math.isfinite(initial_kl):
                raise NonFiniteError("the output of the quantized model has NaN or infinity")
            if config.gradient_checkpointing:
                stack.enter_context(_checkpointed(blocks))
            for _ in range(config.iters):
                samples = next(batches)
                positions = sum(teacher[index].num_positions for index in samples)
                for batch in _stacked([teacher[index] for index in samples]):
                    divergence(student(batch), batch, scale=LOSS_SCALE / positions)
                for value in values:
                    value.pull_gradient()
                gradients = [v.factor.grad for v in values if v.factor.grad is not None]
                if not torch.stack([g.sum() for g in gradients]).sum().isfinite():
                    raise NonFiniteError("the gradients of scale distillation have NaN or infinity")
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                for value in values:
                    value.apply()
                on_iteration()
            moved = sum(scale.finish() for scale in scales)
            final_kl = holdout_kl()
            kept = final_kl < initial_kl
        finally:
            if not kept:
                for value in values:
                    value.reset()
                moved = sum(scale.finish() for scale in scales)
    judged_on = "training samples" if train == holdout else "held-out samples"
    seconds = time.perf_counter() - started
    return DistillationResult(judged_on, initial_kl, final_kl, kept, moved, seconds)


def _schedule(step: int, iters: int) -> float:
    """Linear warm-up times cosine decay to 0."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / iters))


def _stacked(batches: list[TeacherBatch]) -> Iterator[TeacherBatch]:
    """Yield batches that have the same shapes as one."""
    inputs = [batch.inputs for batch in batches]
    for indices, joined in stacks(inputs, lambda index: batches[index].mask is None):
        group = [batches[index] for index in indices]
        masks = [batch.mask for batch in group if batch.mask is not None]
        yield TeacherBatch(
            joined,
            torch.cat([batch.tokens for batch in group]),
            torch.cat([batch.log_probs for batch in group]),
            torch.cat(masks) if masks else None,
            group[0].recorded,
        )


def _checkpointed(blocks: list[nn.Module]) -> AbstractContextManager[None]:
    """Keep only the inputs of blocks for the backward pass, and run each block again there."""

    def forward_of(forward: Callable) -> Callable:
        def forward_again(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return forward_again

    return forwards_replaced({block: forward_of(block.forward) for block in blocks})
