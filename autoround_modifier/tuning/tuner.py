"""
Tunes one group of blocks (SignRound, https://arxiv.org/abs/2309.05516, algorithm 1).

Two choices differ from the reference implementation. Candidates are compared on one fixed slice
of the calibration samples that is never tuned on, where the reference compares the losses of
different minibatches; and the last iterate is a candidate like the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoround_modifier.blocks.forwards import quantized_forwards
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.blocks.samples import stack_masks
from autoround_modifier.errors import CalibrationError
from autoround_modifier.formats import QuantizedWeight, TunedWeight
from autoround_modifier.parallel import summed
from autoround_modifier.tuning.layer_errors import LayerError, layer_errors
from autoround_modifier.tuning.loss import LOSSES
from autoround_modifier.tuning.optimizer import SignSGD
from autoround_modifier.tuning.sampling import SampleShare, minibatches, split_holdout
from autoround_modifier.tuning.step import Step

__all__ = ["Tuner", "TuningConfig", "TuningResult", "num_tokens"]

# Only signs of gradients are used, so scaling the loss is free; it keeps float16 from underflow.
LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class TuningConfig:
    """Settings of `Tuner`; the fields of the same names of `AutoRoundModifier` explain them."""

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
    :ivar failure: what had NaN or infinity, so that the initial rounding was kept; None if nothing
    :ivar errors: of the output of each layer, on held-out samples
    """

    weights: dict[nn.Linear, QuantizedWeight]
    initial_loss: float
    best_loss: float
    best_iteration: int
    seconds: float
    failure: str | None = None
    errors: dict[nn.Linear, LayerError] = field(default_factory=dict)


@dataclass
class Tuner:
    """
    :param group: the blocks, in full precision; they are not changed
    :param formats: initial rounding of each layer to tune
    :param inputs: what the blocks will see: (1, tokens, hidden) per sample, from the quantized
        blocks before them
    :param targets: (1, tokens, hidden) per sample, from the full-precision model
    :param masks: (1, tokens) bool per sample, None where every token counts
    :param config: settings
    :param fixed: weights of layers that are quantized but not tuned
    :param experts: layers that see few of the tokens; see `Step`
    :param share: which of all samples these are; None for all
    """

    group: BlockGroup
    formats: Mapping[nn.Linear, TunedWeight]
    inputs: list[Tensor]
    targets: list[Tensor]
    masks: list[Tensor | None]
    config: TuningConfig
    fixed: Mapping[nn.Linear, QuantizedWeight] = field(default_factory=dict)
    experts: Container[nn.Module] = ()
    share: SampleShare | None = None

    def __post_init__(self) -> None:
        self._share = self.share or SampleShare.everything(
            [num_tokens(x, mask) for x, mask in zip(self.targets, self.masks, strict=True)]
        )
        self._loss_function = LOSSES[self.config.loss]
        self._fixed_forwards = quantized_forwards(self.fixed, self.experts)
        # Whether nothing so far had NaN or infinity: asked for at candidates, not in each step.
        self._finite = torch.ones((), dtype=torch.bool, device=self.group.device)
        self._train, self._holdout = split_holdout(
            len(self._share.num_tokens), self.config.holdout_fraction, self.config.seed
        )

    def run(self, on_iteration: Callable[[], None] = lambda: None) -> TuningResult:
        """
        :param on_iteration: called after each step, for progress bars
        :return: the best candidate on the held-out samples; the initial rounding if a loss or a
            gradient had NaN or infinity
        """
        result = self._tune(on_iteration)
        result.errors = self._errors(result.weights)
        return result

    def move_samples(self, device: torch.device) -> None:
        """Keep all that blocks are called with, the targets and the masks on another device."""
        self.group.move_calls(device)
        self.inputs[:] = [x.to(device) for x in self.inputs]
        self.targets[:] = [x.to(device) for x in self.targets]
        self.masks[:] = [None if x is None else x.to(device) for x in self.masks]

    def _tune(self, on_iteration: Callable[[], None]) -> TuningResult:
        started = time.perf_counter()
        config, formats = self.config, self.formats
        evaluate_at = _evaluation_points(config.iters, config.holdout_evaluations)

        def result(failure: str | None = None) -> TuningResult:
            seconds = time.perf_counter() - started
            return TuningResult(best, initial_loss, best_loss, best_iteration, seconds, failure)

        with self.group.frozen(), torch.enable_grad():
            for fmt in formats.values():
                fmt.make_trainable(config.enable_minmax_tuning)
            optimizer = SignSGD(formats, config.iters, config.lr, config.minmax_lr)
            batches = minibatches(self._train, config.batch_size, config.seed)

            best, best_iteration = self._quantized(), 0
            initial_loss = best_loss = self._holdout_loss()
            if not math.isfinite(initial_loss):
                return result("the output of the quantized block")

            for iteration in range(1, config.iters + 1):
                self._step(
                    [next(batches) for _ in range(config.gradient_accumulate_steps)], optimizer
                )
                on_iteration()
                if iteration in evaluate_at:
                    loss = self._holdout_loss()
                    if not math.isfinite(loss):
                        for fmt in formats.values():
                            fmt.make_trainable(config.enable_minmax_tuning)
                        best, best_loss, best_iteration = self._quantized(), initial_loss, 0
                        return result(f"the loss or a gradient before iteration {iteration + 1}")
                    if loss < best_loss:
                        best.clear()  # before the next one is made
                        best.update(self._quantized())
                        best_loss, best_iteration = loss, iteration
        return result()

    def _errors(self, weights: Mapping[nn.Linear, QuantizedWeight]) -> dict[nn.Linear, LayerError]:
        """:return: of one batch of held-out samples"""
        samples = self._share.local(self._holdout[: self.config.batch_size])
        return layer_errors(
            self.group, self.formats, weights, self._fixed_forwards, self.inputs, samples
        )

    def _step(self, batches: list[list[int]], optimizer: SignSGD) -> None:
        local = [self._share.local(batch) for batch in batches]
        passes = sum(len(self.group.stackable(self.inputs, samples)) for samples in local)
        step = Step(self.formats, optimizer, self.experts, one_pass=passes == 1)
        with self.group.quantized({**step.forwards, **self._fixed_forwards}):
            for samples, batch in zip(local, batches, strict=True):
                loss = self._loss(samples, LOSS_SCALE / self._share.tokens_of(batch))
                self._finite &= loss.isfinite()
        step.end()
        if step.finite is not None:
            self._finite &= step.finite.to(self._finite.device)

    def _loss(self, samples: list[int], backward_scale: float | None = None) -> Tensor:
        """
        Sum over the tokens of samples held here; with ``backward_scale``, its gradients as well.
        """
        group = self.group
        total = torch.zeros((), device=group.device)
        for indices, hidden in group.microbatches(self.inputs, samples):
            target = torch.cat([self.targets[index].to(group.device) for index in indices])
            mask = stack_masks(self.masks, indices, target)
            loss = self._loss_function(group.forward(hidden, indices), target, mask)
            if backward_scale is not None:
                if not loss.requires_grad:
                    raise CalibrationError(
                        f"{', '.join(type(block).__name__ for block in group.blocks)}: no gradient "
                        "of the output reaches the weights, so that they cannot be tuned. Quantize "
                        "without tuning (`preset: opt_rtn`)."
                    )
                (loss * backward_scale).backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def _holdout_loss(self) -> float:
        """
        Mean per token on the held-out samples of all processes, as the weights are now; NaN also
        if anything had NaN or infinity since the start.
        """
        forwards = quantized_forwards(self.formats, self.experts)
        samples, size = self._share.local(self._holdout), self.config.batch_size
        total = torch.zeros((), device=self.group.device)
        with self.group.quantized({**forwards, **self._fixed_forwards}):
            for start in range(0, len(samples), size):
                total += self._loss(samples[start : start + size])
        total = summed(total.where(self._finite, torch.nan))
        return float(total / self._share.tokens_of(self._holdout))

    def _quantized(self) -> dict[nn.Linear, QuantizedWeight]:
        return {layer: fmt.quantized() for layer, fmt in self.formats.items()}


def _evaluation_points(iters: int, evaluations: int) -> set[int]:
    """:return: evenly spaced iterations, the last one among them"""
    evaluations = max(1, min(evaluations, iters))
    return {round(iters * (k + 1) / evaluations) for k in range(evaluations)}


def num_tokens(target: Tensor, mask: Tensor | None) -> int:
    """:return: number of tokens that count in one sample"""
    return target.shape[1] if mask is None else int(mask.sum())
