"""Sign-gradient descent: ``p <- p - lr * sign(dL/dp)`` (SignRound, https://arxiv.org/abs/2309.05516)."""

from __future__ import annotations

import torch
from torch import Tensor

from autoround_modifier.formats import RoundingFormat

__all__ = ["SignSGD", "default_lr"]


def default_lr(iters: int, num_bits: int) -> float:
    """
    ``1 / iters``, so that the steps of a linearly decaying schedule add up to half an integer
    step; twice that for long runs at 3 bits and below, as the reference implementation does.

    :param iters: number of steps, > 0
    """
    return (2.0 if iters >= 1000 and num_bits <= 3 else 1.0) / iters


class SignSGD:
    """
    :param formats: the weights being tuned, trainable
    :param iters: number of steps; the step size falls linearly to zero over them
    :param lr: step size of V; None for `default_lr` of each weight's bit width
    :param minmax_lr: step size of alpha and beta; None for that of V
    """

    def __init__(
        self,
        formats: list[RoundingFormat],
        iters: int,
        lr: float | None = None,
        minmax_lr: float | None = None,
    ):
        self.formats = formats
        self.iters = iters
        self.step_sizes = []
        for fmt in formats:
            rounding_lr = default_lr(iters, fmt.num_bits) if lr is None else lr
            self.step_sizes.append((rounding_lr, rounding_lr if minmax_lr is None else minmax_lr))
        self.iteration = 0

    def step(self, gradients: list[Tensor | None]) -> None:
        """
        :param gradients: of the loss by each dequantized weight; None leaves a weight as it is
        """
        decay = 1.0 - self.iteration / self.iters
        for fmt, lrs, gradient in zip(self.formats, self.step_sizes, gradients, strict=True):
            if gradient is not None:
                rounding_lr, clipping_lr = torch.tensor(lrs, device=gradient.device) * decay
                fmt.descend(gradient, rounding_lr, clipping_lr)
        self.iteration += 1
