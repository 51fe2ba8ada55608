"""What every numeric family gives the tuner: quantization of one weight, and a step downhill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

__all__ = ["QuantizedWeight", "RoundingFormat"]


@dataclass
class QuantizedWeight:
    """
    One quantized weight, as it is saved.

    :param values: (out_features, in_features), the integers, int8
    :param scale: (out_features, groups), the weight's dtype
    :param zero_point: (out_features, groups), int8; zeros if symmetric
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        """:return: ``(q - z) * s``, (out_features, in_features), the weight's dtype"""
        groups = self.values.unflatten(-1, (self.scale.shape[-1], -1))
        steps = groups.float() - self.zero_point.unsqueeze(-1)
        return steps.mul_(self.scale.unsqueeze(-1)).to(self.scale.dtype).flatten(-2)


class RoundingFormat(ABC):
    """
    The tuned state of one weight. Before `make_trainable` it rounds to nearest.

    :ivar num_bits: bits of one value
    :ivar rounding: V, or None
    :ivar clipping: alpha and beta, or empty
    :ivar clipping_limit: upper limit of alpha and beta; the lower one is 0
    """

    num_bits: int
    clipping_limit: float = 1.0

    def __init__(self) -> None:
        self.rounding: Tensor | None = None
        self.clipping: list[Tensor] = []

    @abstractmethod
    def make_trainable(self, tune_clipping: bool) -> None:
        """Create V (zeros) and, if asked for, alpha and beta (ones)."""

    @abstractmethod
    def quantized(self) -> QuantizedWeight:
        """:return: the weight as it would be saved now, in tensors of its own"""

    @abstractmethod
    def dequantized(self) -> Tensor:
        """:return: `quantized`, dequantized: (out_features, in_features), the weight's dtype"""

    @abstractmethod
    def descend(self, gradient: Tensor, rounding_lr: Tensor, clipping_lr: Tensor) -> None:
        """
        One sign-gradient step, in place: ``p <- p - lr * sign(dL/dp)`` for V, alpha and beta.

        :param gradient: dL/dW of the dequantized weight, (out_features, in_features)
        :param rounding_lr: step size of V, scalar
        :param clipping_lr: step size of alpha and beta, scalar
        """
