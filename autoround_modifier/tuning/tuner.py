"""
Tunes one group of blocks (SignRound, https://arxiv.org/abs/2309.05516, algorithm 1).

Two choices differ from the reference implementation. Candidates are compared on one fixed slice
of the calibration samples that is never tuned on, where the reference compares the losses of
different minibatches; and the last iterate is a candidate like the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoround_modifier.calibration.samples import stack_masks
from autoround_modifier.errors import NonFiniteError
from autoround_modifier.formats import QuantizedWeight, RoundingFormat
from autoround_modifier.tuning.block import BlockGroup
from autoround_modifier.tuning.loss import LOSSES
from autoround_modifier.tuning.optimizer import SignSGD
from autoround_modifier.tuning.sampling import minibatches, split_holdout

__all__ = ["TuningConfig", "TuningResult", "tune"]

# Only signs of gradients are used, so scaling the loss is free; it keeps float16 from underflow.
LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class TuningConfig:
    """Settings of `tune`; the fields of the same names of `AutoRoundModifier` explain them."""

    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    loss: str = "mse"
    enable_minmax_tuning: bool | None = None
    holdout_fraction: float = 0.125
    holdout_evaluations: int = 5
    seed: int = 42


@dataclass
class TuningResult:
    """
    :ivar weights: the best candidate, as it will be saved
    :ivar initial_loss: mean loss per token on the held-out samples before tuning
    :ivar best_loss: the same for the best candidate
    :ivar best_iteration: the iteration it comes from; 0 is the initial rounding
    :ivar seconds: time spent
    """

    weights: dict[nn.Linear, QuantizedWeight]
    initial_loss: float
    best_loss: float
    best_iteration: int
    seconds: float


def tune(
    group: BlockGroup,
    formats: dict[nn.Linear, RoundingFormat],
    inputs: list[Tensor],
    targets: list[Tensor],
    masks: list[Tensor | None],
    config: TuningConfig,
    on_iteration: Callable[[], None] = lambda: None,
) -> TuningResult:
    """
    :param group: the blocks, in full precision; they are not changed
    :param formats: initial rounding of each layer to tune
    :param inputs: what the blocks will see: (1, tokens, hidden) per sample, from the quantized
        blocks before them
    :param targets: (1, tokens, hidden) per sample, from the full-precision model
    :param masks: (1, tokens) bool per sample, None where every token counts
    :param config: settings
    :param on_iteration: called after each step, for progress bars
    :return: the best candidate on the held-out samples
    :raises NonFiniteError: if the blocks give NaN or infinity with the initial rounding
    """
    started = time.perf_counter()
    train, holdout = split_holdout(len(inputs), config.holdout_fraction, config.seed)
    evaluate_at = _evaluation_points(config.iters, config.holdout_evaluations)
    loss_function = LOSSES[config.loss]

    num_tokens = [_num_tokens(target, mask) for target, mask in zip(targets, masks, strict=True)]

    def tokens_of(samples: list[int]) -> int:
        return max(1, sum(num_tokens[index] for index in samples))

    def batch_loss(samples: list[int], backward_scale: float | None = None) -> Tensor:
        """Sum over the tokens of these samples; with ``backward_scale``, its gradients as well."""
        total = torch.zeros((), device=group.device)
        for indices, hidden in group.microbatches(inputs, samples):
            target = torch.cat([targets[index].to(group.device) for index in indices])
            mask = stack_masks(masks, indices, target)
            loss = loss_function(group.forward(hidden, indices), target, mask)
            if backward_scale is not None:
                (loss * backward_scale).backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def holdout_loss(candidate: dict[nn.Linear, QuantizedWeight]) -> float:
        weights = {layer: weight.dequantize() for layer, weight in candidate.items()}
        with group.quantized(weights):
            starts = range(0, len(holdout), config.batch_size)
            losses = [batch_loss(holdout[start : start + config.batch_size]) for start in starts]
            return float(torch.stack(losses).sum() / tokens_of(holdout))

    with group.frozen(), torch.enable_grad():
        for fmt in formats.values():
            fmt.make_trainable(config.enable_minmax_tuning)
        optimizer = SignSGD(list(formats.values()), config.iters, config.lr, config.minmax_lr)
        batches = minibatches(train, config.batch_size, config.seed)

        best, best_iteration = {layer: fmt.quantized() for layer, fmt in formats.items()}, 0
        initial_loss = best_loss = holdout_loss(best)
        if not math.isfinite(initial_loss):
            raise NonFiniteError("the output of the quantized block has NaN or infinity")

        for iteration in range(1, config.iters + 1):
            # The quantized weights are leaves while samples accumulate gradients into them, so
            # each step quantizes once, however many samples it sees.
            leaves = {layer: fmt.dequantized().requires_grad_() for layer, fmt in formats.items()}
            with group.quantized(leaves):
                for _ in range(config.gradient_accumulate_steps):
                    samples = next(batches)
                    batch_loss(samples, LOSS_SCALE / tokens_of(samples))
            optimizer.step([leaf.grad for leaf in leaves.values()])
            del leaves  # before the next ones are made
            on_iteration()

            if iteration in evaluate_at:
                candidate = {layer: fmt.quantized() for layer, fmt in formats.items()}
                loss = holdout_loss(candidate)
                if loss < best_loss:
                    best, best_loss, best_iteration = candidate, loss, iteration

    return TuningResult(
        best, initial_loss, best_loss, best_iteration, time.perf_counter() - started
    )


def _evaluation_points(iters: int, evaluations: int) -> set[int]:
    """:return: evenly spaced iterations, the last one among them"""
    evaluations = max(1, min(evaluations, iters))
    return {round(iters * (k + 1) / evaluations) for k in range(evaluations)}


def _num_tokens(target: Tensor, mask: Tensor | None) -> int:
    """:return: number of tokens that count in one sample"""
    return target.shape[1] if mask is None else int(mask.sum())
