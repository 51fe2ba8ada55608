"""
What a layer loses under each scheme, from its inputs and the gradients at its outputs.

The divergence of the quantized model from the original is zero at the original, and so is its
gradient; what remains is its curvature, the Fisher information. With labels drawn from the
original's own predictions, the gradients ``g_t = dL/dy_t`` at the output of a layer give it: an
error ``e_t`` of the output at token t raises the divergence by about ``(g_t e_t)^2 / 2``, if errors
at different tokens and layers are independent, which is assumed (`FisherScore`). The gradients are
those of the original, so one backward pass serves all schemes; the errors are those of weights and
activations together, ``e_t = Q(W) Q(x_t) - W x_t``.

DeltaLoss of SignRoundV2 (https://arxiv.org/abs/2512.04746, section 3.1) is the first order,
``sum |dL/dW (Q(W) - W)|``, where L is the loss on the text itself: labels drawn from the model
would leave nothing but noise of that gradient (`DeltaLossScore`). SignRoundV2 takes it at the
quantized weights, with one pass for each scheme; here it is taken at the original's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SCORES", "DeltaLossScore", "FisherScore", "QuantizedLayer", "Score"]


@dataclass(frozen=True)
class QuantizedLayer:
    """
    A layer under one scheme.

    :param error: Q(W) - W, (out_features, in_features), the weight's dtype
    :param quantize_input: x -> Q(x), (tokens, in_features); None for 16-bit activations
    """

    error: Tensor
    quantize_input: Callable[[Tensor], Tensor] | None = None


class Score(ABC):
    """
    Of one linear layer under each of several schemes. An embedding is a linear layer whose inputs
    are one-hot, and never quantized.

    :param weight: W, (out_features, in_features); (vocabulary, features) of an embedding
    :param options: by name of the scheme
    :cvar sampled_labels: whether the loss has labels drawn from the model, or those of the text
    :ivar reached: whether a gradient came back to the layer
    """

    sampled_labels: ClassVar[bool]

    def __init__(self, weight: Tensor, options: dict[str, QuantizedLayer]):
        self.weight = weight
        self.options = options
        self.reached = False

    @abstractmethod
    def add(self, x: Tensor, gradient: Tensor) -> None:
        """
        :param x: the layer's inputs, (tokens, in_features); (tokens,) ids for an embedding
        :param gradient: dL/dy of the sum of the losses of all tokens, (tokens, out_features)
        """

    @abstractmethod
    def total(self) -> dict[str, float]:
        """:return: the sum over all tokens, by name of the scheme"""


class FisherScore(Score):
    """``sum over t of (g_t e_t)^2 / 2``: the divergence to second order, in nats."""

    sampled_labels = True

    def __init__(self, weight: Tensor, options: dict[str, QuantizedLayer]):
        super().__init__(weight, options)
        self._sums = {name: torch.zeros((), dtype=torch.float64) for name in options}

    def add(self, x: Tensor, gradient: Tensor) -> None:
        for name, option in self.options.items():
            if option.quantize_input is None:
                error = _apply(option.error, x)
            else:
                quantized = option.quantize_input(x)
                error = F.linear(quantized, option.error) + F.linear(quantized - x, self.weight)
            projected = (gradient.float() * error.float()).sum(-1)
            self._sums[name] += projected.square().sum().double().cpu() / 2

    def total(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._sums.items()}


class DeltaLossScore(Score):
    """``sum |dL/dW (Q(W) - W)| + sum |dL/dx (Q(x) - x)|``"""

    sampled_labels = False

    def __init__(self, weight: Tensor, options: dict[str, QuantizedLayer]):
        super().__init__(weight, options)
        self._gradient = torch.zeros_like(weight, dtype=torch.float32)
        self._activations = dict.fromkeys(options, 0.0)

    def add(self, x: Tensor, gradient: Tensor) -> None:
        if x.ndim == 1:
            self._gradient.index_add_(0, x, gradient.float())
            return
        self._gradient += (gradient.T @ x).float()
        quantizing = {
            name: option.quantize_input
            for name, option in self.options.items()
            if option.quantize_input is not None
        }
        if quantizing:
            input_gradient = gradient @ self.weight
            for name, quantize in quantizing.items():
                change = input_gradient.float() * (quantize(x) - x).float()
                self._activations[name] += float(change.abs().sum())

    def total(self) -> dict[str, float]:
        return {
            name: float((self._gradient * option.error).abs().sum()) + self._activations[name]
            for name, option in self.options.items()
        }


def _apply(weight: Tensor, x: Tensor) -> Tensor:
    """:return: (tokens, out_features)"""
    return F.linear(x, weight) if x.is_floating_point() else F.embedding(x, weight)


SCORES: dict[str, type[Score]] = {"fisher": FisherScore, "delta_loss": DeltaLossScore}
