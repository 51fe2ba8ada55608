"""
One weight of GSQ (https://arxiv.org/abs/2604.18556): a choice among levels, relaxed by
Gumbel-softmax samples, and the optimizer of its logits and scales, Lion
(https://arxiv.org/abs/2302.06675).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoround_modifier.formats.integer import integer_range

__all__ = ["GumbelNoise", "Optimization", "RelaxedWeight", "lion"]

# Numbers that pass through the caches together
SLICE_ELEMENTS = 2**16
# Above 2 bits a weight may move by at most so many levels from where it starts.
LARGEST_SHIFT = 2


@dataclass(frozen=True)
class Optimization:
    """
    What one step is taken with.

    :param lr: step size of the logits
    :param scales_lr: step size of the scales
    :param weight_decay: of the logits; scales have none
    :param betas: of Lion
    """

    lr: float
    scales_lr: float
    weight_decay: float
    betas: tuple[float, float]


class GumbelNoise:
    """
    Gumbel-distributed numbers, drawn once and read from a random place each time: drawing them anew
    takes longer than all the rest of a step.

    :param size: how many are drawn
    """

    def __init__(self, size: int, generator: torch.Generator, device: torch.device | None = None):
        self.generator = generator
        uniform = torch.rand(size, generator=generator).clamp_(min=1e-8).to(device)
        self._drawn = uniform.log_().neg_().log_().neg_()

    def __call__(self, count: int) -> Tensor:
        """:return: (count,), float32, not to be changed"""
        while len(self._drawn) < 2 * count:
            self._drawn = self._drawn.repeat(2)
        start = torch.randint(len(self._drawn) - count, (1,), generator=self.generator).item()
        return self._drawn[start : start + count]


class RelaxedWeight:
    """
    Logits over levels for each weight. With 2 bits the levels are all four integers; with more, the
    integer that the weight starts from and up to two on either side of it.

    :param integers: to start from, (out_features, in_features), float32
    :param scales: to start from, (out_features, groups), float32
    :param noise: used for the samples
    :param std: standard deviation of the noise in the initial logits
    :param strength: how far the initial logits lie apart, in units of ``std``
    :ivar logits: (levels, out_features, in_features), float32; minus infinity where a level is no
        integer of the format
    """

    def __init__(
        self,
        integers: Tensor,
        scales: Tensor,
        num_bits: int,
        noise: GumbelNoise,
        std: float = 0.01,
        strength: float = 6.0,
    ):
        low, high = integer_range(num_bits)
        if num_bits == 2:
            levels = torch.arange(low, high + 1)
            self._base = torch.zeros_like(integers)
        else:
            levels = torch.arange(-LARGEST_SHIFT, LARGEST_SHIFT + 1)
            self._base = integers
        self.noise = noise
        self._levels = levels.to(integers).view(-1, 1, 1)
        reached = self._base + self._levels
        valid = (reached >= low) & (reached <= high)
        distance = ((integers - reached).square() * -0.5).where(valid, integers.new_zeros(()))
        centred = distance - distance.sum(0) / valid.sum(0)
        random = torch.randn(centred.shape, generator=noise.generator).to(centred)
        logits = std * (random + strength * centred)
        self.logits = logits.where(valid, logits.new_tensor(-torch.inf))
        self.scales = scales.float().clone()
        self._momenta = torch.zeros_like(self.logits), torch.zeros_like(self.scales)
        self._sharpness = 0.0
        self._probabilities = torch.empty_like(self.logits)
        self._values = torch.empty_like(integers)
        rows, columns = integers.shape
        step = max(1, SLICE_ELEMENTS // (len(levels) * columns))
        self._slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def sample(self, temperature: float, logit_scale: float, noisy: bool = True) -> Tensor:
        """
        :param temperature: of the softmax
        :param logit_scale: factor of the logits, but not of the noise
        :param noisy: false for the softmax alone
        :return: (out_features, in_features), float32
        """
        self._sharpness = logit_scale / temperature
        levels = len(self._levels)
        for rows in self._slices:
            scores = self.logits[:, rows] * logit_scale
            if noisy:
                scores += self.noise(scores.numel()).view(levels, *scores.shape[1:])
            chosen = torch.softmax(scores.div_(temperature), 0, out=self._probabilities[:, rows])
            torch.sum(chosen * self._levels, 0, out=self._values[rows])
            self._values[rows] += self._base[rows]
        return self._scaled(self._values)

    def descend(self, gradient: Tensor, optimization: Optimization) -> None:
        """
        Update logits and scales.

        :param gradient: of the loss by the last `sample`, (out_features, in_features)
        """
        by_value = self._scaled(gradient)
        by_scale = self._by_group(gradient * self._values).sum(-1)
        one = optimization
        for rows in self._slices:
            away = self._levels + self._base[rows] - self._values[rows]
            by_logit = away.mul_(self._probabilities[:, rows]).mul_(by_value[rows])
            lion(
                self.logits[:, rows],
                self._momenta[0][:, rows],
                by_logit.mul_(self._sharpness),
                one.lr,
                one.betas,
                one.weight_decay,
            )
        lion(self.scales, self._momenta[1], by_scale, one.scales_lr, one.betas)

    def hard(self) -> tuple[Tensor, Tensor]:
        """:return: likeliest integers, (out_features, in_features), and scales, float32"""
        return self._levels.flatten()[self.logits.argmax(0)] + self._base, self.scales

    def _by_group(self, weight: Tensor) -> Tensor:
        return weight.unflatten(1, (self.scales.shape[1], -1))

    def _scaled(self, weight: Tensor) -> Tensor:
        return (self._by_group(weight) * self.scales.unsqueeze(-1)).flatten(1)


def lion(
    parameter: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
) -> None:
    """
    One step of Lion, in place: ``p <- (1 - lr * decay) p - lr * sign(b1 m + (1 - b1) g)``, then
    ``m <- b2 m + (1 - b2) g``.

    :param momentum: m, zeros before the first step
    :param betas: b1 and b2
    """
    direction = torch.lerp(gradient, momentum, betas[0]).sign_()
    parameter.mul_(1 - lr * weight_decay).sub_(direction, alpha=lr)
    momentum.lerp_(gradient, 1 - betas[1])
