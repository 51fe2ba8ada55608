"""Linear layers that compute with fixed integers and trained scales."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoround_modifier.blocks.patching import forwards_replaced
from autoround_modifier.distillation.base import TrainedValue
from autoround_modifier.host.layers import write_parameter
from autoround_modifier.host.quantized_weights import read_layer
from autoround_modifier.host.schemes import QuantizationArgs
from autoround_modifier.host.write_back import write_back

__all__ = ["TrainedScale"]

# A scale keeps its sign, and this share of its first size: integers must not lose their meaning.
SMALLEST = 0.05


class TrainedScale(TrainedValue):
    """
    The scale of one quantized linear layer, trained while its integers stay what they are.

    The layer's own weight always holds the dequantized values of the current scale. The integers
    are kept as well, one byte each.

    :param layer: with ``weight_scale`` and ``weight_zero_point``
    :param args: how the weight is quantized, strategy ``group``, ``channel`` or ``tensor``
    """

    def __init__(self, layer: nn.Linear, args: QuantizationArgs):
        self.layer = layer
        self.args = args
        self.quantized = read_layer(layer, args)
        self.values, scale = self.quantized.values, self.quantized.scale
        self.initial = scale.clone()
        self.unit = scale.float().abs().mean()
        self.factor = nn.Parameter(scale.float() / self.unit)

    def pull_gradient(self) -> None:
        pass  # autograd gives it to the factor itself

    @torch.no_grad()
    def apply(self) -> None:
        smallest = self.initial.float() * SMALLEST / self.unit
        shrunk = self.factor.sign() != smallest.sign()
        shrunk |= self.factor.abs() < smallest.abs()
        self.factor.copy_(torch.where(shrunk, smallest, self.factor))
        self._write((self.factor * self.unit).to(self.initial.dtype))

    def reset(self) -> None:
        self.quantized.parts["values"] = self.values
        self._write(self.initial)

    @property
    def scale(self) -> Tensor:
        """(1,) or (out_features, groups), the current scale"""
        return cast(Tensor, self.layer.weight_scale).detach()

    @torch.no_grad()
    def finish(self) -> int:
        """
        Make sure that saving recovers the integers.

        :return: number of integers that had to move by one step
        """
        return write_back(self.layer, self.quantized, self.args)

    @torch.no_grad()
    def _write(self, scale: Tensor) -> None:
        self.quantized.parts["scale"] = scale
        write_parameter(self.layer, "weight", self.quantized.dequantize())
        write_parameter(self.layer, "weight_scale", scale)

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        self._write(self.initial)
        with forwards_replaced({self.layer: self._forward()}):
            yield

    def _forward(self) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return F.linear(x, self.layer.weight, self.layer.bias)
            y = _ScaledLinear.apply(x, self.factor, self)
            return y if self.layer.bias is None else y + self.layer.bias

        return forward


class _ScaledLinear(torch.autograd.Function):
    """
    ``y = x W^T`` with ``W = steps * scale``. Only the input and the scale get gradients; that of
    the weight exists for one layer at a time: dL/ds of a group is the sum of dL/dW * steps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, scale: TrainedScale) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return F.linear(x, scale.layer.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x,) = ctx.saved_tensors
        weight, scale = ctx.scale.layer.weight, ctx.scale.scale
        of_input = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        columns = _columns(scale.float())
        by_group = (_groups(of_weight, columns) * _groups(weight, columns)).sum(
            dim=(0, -1) if scale.numel() == 1 else -1, dtype=torch.float32
        )
        by_group = by_group.view_as(scale) / scale.float()
        of_factor = torch.where(scale == 0, 0.0, by_group) * ctx.scale.unit
        return of_input, of_factor, None


def _columns(per_group: Tensor) -> Tensor:
    """(1,) or (out_features, groups) -> (1 or out_features, groups, 1)"""
    return per_group.view(1, 1, 1) if per_group.numel() == 1 else per_group.unsqueeze(-1)


def _groups(weight: Tensor, columns: Tensor) -> Tensor:
    """(out_features, in_features) -> (out_features, groups, group_size)"""
    return weight.unflatten(-1, (columns.shape[1], -1))
