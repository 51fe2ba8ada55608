"""Sign-gradient descent: ``p <- p - lr * sign(dL/dp)`` (SignRound, https://arxiv.org/abs/2309.05516)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoround_modifier.formats import TunedWeight

__all__ = ["SignSGD", "default_lr", "default_minmax_lr"]


def default_lr(iters: int, num_bits: int) -> float:
    """
    ``1 / iters``, so that the steps of a linearly decaying schedule add up to half an integer
    step; twice that for long runs at 3 bits and below, as the reference implementation does.

    :param iters: number of steps, > 0
    """
    return (2.0 if iters >= 1000 and num_bits <= 3 else 1.0) / iters


def default_minmax_lr(lr: float, num_bits: int, searched: bool) -> float:
    """
    ``lr``, as in SignRound, where tuning starts from the observed range. From a searched range it
    is divided by 2^(b-2): alpha and beta are factors of the largest weight, which is 2^(b-1)
    integer steps away from zero, so that a step then moves it by the same number of integer steps
    at 2, 4 and 8 bits.

    :param lr: step size of V
    :param searched: whether the range of integers is the best of a search; false for the observed
        one, and for floating-point numbers
    """
    return lr / 2 ** (num_bits - 2) if searched else lr


class SignSGD:
    """
    :param formats: the weights being tuned, trainable, by their layers
    :param iters: number of steps; the step size falls linearly to zero over them
    :param lr: step size of V; None for `default_lr` of each weight's bit width
    :param minmax_lr: step size of alpha and beta; None for `default_minmax_lr`
    """

    def __init__(
        self,
        formats: Mapping[nn.Linear, TunedWeight],
        iters: int,
        lr: float | None = None,
        minmax_lr: float | None = None,
    ):
        self.formats = formats
        self.iters = iters
        self.step_sizes = {}
        for layer, fmt in formats.items():
            rounding_lr = default_lr(iters, fmt.num_bits) if lr is None else lr
            searched_integers = fmt.searched and fmt.is_integer
            clipping_lr = default_minmax_lr(rounding_lr, fmt.num_bits, searched_integers)
            self.step_sizes[layer] = (
                rounding_lr,
                clipping_lr if minmax_lr is None else minmax_lr,
            )
        self.iteration = 0
        self._schedules: dict[tuple[float, float, torch.device], Tensor] = {}

    def descend(self, layer: nn.Linear, gradient: Tensor) -> None:
        """
        One weight's part of the current step.

        :param gradient: of the loss by the dequantized weight, (out_features, in_features)
        """
        rounding_lr, clipping_lr = self._schedule(layer, gradient.device)[self.iteration]
        self.formats[layer].descend(gradient, rounding_lr, clipping_lr)

    def _schedule(self, layer: nn.Linear, device: torch.device) -> Tensor:
        """
        :return: (iters, 2), float32, the step sizes of V and of alpha and beta at each step; copied
            to the device once, so that no step waits for a copy
        """
        key = (*self.step_sizes[layer], device)
        if key not in self._schedules:
            sizes = torch.tensor(self.step_sizes[layer])
            steps = [sizes * (1.0 - step / self.iters) for step in range(self.iters)]
            self._schedules[key] = torch.stack(steps).to(device)
        return self._schedules[key]

    def end_step(self) -> None:
        """The next call of `descend` belongs to the next step."""
        self.iteration += 1
