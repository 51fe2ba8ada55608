"""Gains and biases that are trained along with the scales."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from autoround_modifier.distillation.base import TrainedValue

__all__ = ["TrainedNorm"]


class TrainedNorm(TrainedValue):
    """
    A gain or bias in the model's dtype.

    :param parameter: changed in place; a parameter that is zero throughout has size 1
    """

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter
        self.initial = parameter.detach().clone()
        size = self.initial.float().abs().mean()
        self.unit = torch.where(size == 0, 1.0, size)
        self.factor = nn.Parameter(self.initial.float() / self.unit)

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        self.parameter.requires_grad_(True)
        try:
            yield
        finally:
            self.parameter.requires_grad_(False)
            self.parameter.grad = None

    def pull_gradient(self) -> None:
        if self.parameter.grad is not None:
            self.factor.grad = self.parameter.grad.float() * self.unit
            self.parameter.grad = None

    @torch.no_grad()
    def apply(self) -> None:
        self.parameter.copy_(self.factor * self.unit)

    @torch.no_grad()
    def reset(self) -> None:
        self.parameter.copy_(self.initial)
