"""Gains and biases that are trained along with the scales."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autoround_modifier.distillation.base import TrainedValue
from autoround_modifier.host.layers import write_parameter

__all__ = ["TrainedNorm"]


class TrainedNorm(TrainedValue):
    """
    A gain or bias in the model's dtype. One that is zero throughout has size 1.

    Offloaded parameters must stay onloaded (`weights_on_device`) while this exists: the gradient
    belongs to the tensor that the forward pass sees.

    :param module: has the parameter
    :param name: of the parameter in the module
    """

    def __init__(self, module: nn.Module, name: str):
        self.module = module
        self.name = name
        self.parameter: nn.Parameter = getattr(module, name)
        self.initial = self.parameter.detach().clone()
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
        self._write((self.factor * self.unit).to(self.initial.dtype))

    @torch.no_grad()
    def reset(self) -> None:
        self._write(self.initial)

    def _write(self, value: Tensor) -> None:
        self.parameter.copy_(value)  # what the forward pass sees
        write_parameter(self.module, self.name, value)  # what stays
