"""
How linear layers compute while a block is tuned: with weights other than their own.

A layer that sees every token computes with one weight through a whole step. The experts of a
mixture are many, and see few tokens each: their weights exist only while one is multiplied by, and
so do their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoround_modifier.formats import QuantizedWeight, TunedWeight

__all__ = ["Forward", "quantized_forwards", "with_weight", "with_weight_trained_on_demand"]

Forward = Callable[[Tensor], Tensor]


def quantized_forwards(
    weights: Mapping[nn.Linear, TunedWeight | QuantizedWeight],
    experts: Container[nn.Module] = (),
) -> dict[nn.Module, Forward]:
    """
    :param weights: by layer; they are not trained
    :param experts: layers that see few of the tokens
    :return: what the layers compute with these weights
    """

    def on_demand(layer: nn.Linear, weight: TunedWeight | QuantizedWeight) -> Forward:
        return lambda x: F.linear(x, weight.dequantize(), layer.bias)

    return {
        layer: on_demand(layer, weight)
        if layer in experts
        else with_weight(weight.dequantize(), layer.bias)
        for layer, weight in weights.items()
    }


def with_weight(weight: Tensor, bias: Tensor | None) -> Forward:
    """
    :param weight: (out_features, in_features); gradients flow to it
    :param bias: (out_features,) or None
    """
    return lambda x: F.linear(x, weight, bias)


def with_weight_trained_on_demand(
    weight: Callable[[], Tensor], bias: Tensor | None, on_gradient: Callable[[Tensor], None]
) -> Forward:
    """
    :param weight: makes the weight, (out_features, in_features); called again on the way back
    :param bias: (out_features,) or None
    :param on_gradient: receives the gradient by the weight, during the backward pass
    """
    # Without an input that wants a gradient there would be no backward pass.
    anchor = torch.zeros((), requires_grad=True)
    return lambda x: _LinearOnDemand.apply(x, anchor, weight, bias, on_gradient)


class _LinearOnDemand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        on_gradient: Callable[[Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.on_gradient = weight, on_gradient
        return F.linear(x, weight(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        # before the weight can change
        d_x = gradient @ ctx.weight() if ctx.needs_input_grad[0] else None
        if gradient.numel():  # else no token came here
            ctx.on_gradient(gradient.flatten(0, -2).T @ x.flatten(0, -2))
        return d_x, None, None, None, None
