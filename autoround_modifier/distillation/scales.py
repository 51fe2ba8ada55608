"""Linear layers that compute with fixed integers and trained scales."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoround_modifier.blocks.patching import forwards_replaced
from autoround_modifier.distillation.base import TrainedValue
from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.host.layers import write_parameter
from autoround_modifier.host.quantized_weights import read_layer
from autoround_modifier.host.schemes import QuantizationArgs
from autoround_modifier.host.write_back import write_back

__all__ = ["StreamedScale", "TrainedScale"]

# A scale keeps its sign, and this share of its first size: integers must not lose their meaning.
SMALLEST = 0.05


class TrainedScale(TrainedValue):
    """
    The scale of one quantized linear layer, trained while its integers stay what they are.

    The layer's own weight always holds the dequantized values of the current scale. The integers
    are kept as well, one byte each.

    :param layer: with ``weight_scale`` and ``weight_zero_point``
    :param args: how the weight is quantized, strategy ``group``, ``channel`` or ``tensor``
    :ivar scale: the current one, (1,) or (out_features, groups), in the dtype that is saved
    """

    def __init__(self, layer: nn.Linear, args: QuantizationArgs):
        self.layer = layer
        self.args = args
        quantized = read_layer(layer, args)
        self.scale = self.initial = quantized.scale
        self.unit = self.initial.float().abs().mean()
        self.factor = nn.Parameter(self.initial.float() / self.unit)
        self._keep(quantized)

    def _keep(self, quantized: QuantizedWeight) -> None:
        self.quantized = quantized
        self.values = quantized.values

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

    def weight(self) -> Tensor:
        """:return: what the layer computes with, (out_features, in_features)"""
        return self.layer.weight

    @torch.no_grad()
    def finish(self) -> int:
        """
        Give the layer the current scale, so that saving recovers the integers.

        :return: number of integers that had to move by one step
        """
        return write_back(self.layer, self.quantized, self.args)

    @torch.no_grad()
    def _write(self, scale: Tensor) -> None:
        self.scale = self.quantized.parts["scale"] = scale
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
                return F.linear(x, self.weight(), self.layer.bias)
            y = _ScaledLinear.apply(x, self.factor, self)
            return y if self.layer.bias is None else y + self.layer.bias

        return forward


class StreamedScale(TrainedScale):
    """
    The scale of a layer whose weight is brought to the device for each use. Until `finish` the
    layer holds what it held at first, and each use finds the integers in it and multiplies them by
    the current scale. Of the integers only those are kept that `finish` had to move.
    """

    def _keep(self, quantized: QuantizedWeight) -> None:
        self._written = False  # whether the layer holds the current scale
        self._writing: Tensor | None = None  # the first integers, while the layer is written to
        self._moved: tuple[Tensor, Tensor] | None = None  # flat indices, first integers; on the CPU

    def _current(self) -> QuantizedWeight:
        """:return: the first integers with the current scale"""
        quantized = read_layer(self.layer, self.args)
        quantized.parts["scale"] = self.scale
        if self._writing is not None:
            quantized.parts["values"] = self._writing
        elif self._moved is not None:
            indices, first = (x.to(quantized.values.device) for x in self._moved)
            quantized.values.view(-1)[indices] = first
        return quantized

    def weight(self) -> Tensor:
        return self.layer.weight if self._written else self._current().dequantize()

    def reset(self) -> None:
        self._write(self.initial)

    @torch.no_grad()
    def finish(self) -> int:
        quantized = self._current()
        first = self._writing = quantized.values
        moved = write_back(self.layer, quantized, self.args)
        if moved:
            (indices,) = (first != quantized.values).view(-1).nonzero(as_tuple=True)
            self._moved = indices.cpu(), first.view(-1)[indices].cpu()
        self._writing = None
        self._written = True
        return moved

    def _write(self, scale: Tensor) -> None:
        self.scale = scale
        self._written = False


class _ScaledLinear(torch.autograd.Function):
    """
    ``y = x W^T`` with ``W = steps * scale``. Only the input and the scale get gradients; that of
    the weight exists for one layer at a time: dL/ds of a group is the sum of dL/dW * steps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, scale: TrainedScale) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return F.linear(x, scale.weight())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x,) = ctx.saved_tensors
        weight, scale = ctx.scale.weight(), ctx.scale.scale
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
