"""What every numeric family gives the tuner: quantization of one weight, and a step downhill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from autoround_modifier.formats.grouping import Grouping

__all__ = ["QuantizedWeight", "RoundingFormat"]


@dataclass
class QuantizedWeight:
    """
    One quantized weight, as it is saved.

    :param values: (out_features, in_features): integers as int8, floating-point numbers as
        float8_e4m3fn, of which those of E2M1 are some
    :param scale: of the shape that compressed-tensors stores, the weight's dtype
    :param zero_point: same shape, int8; zeros if symmetric
    :param grouping: which weights share a scale
    :param global_scale: (1,), float32, by which all scales are divided; None where the format has
        none
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    grouping: Grouping
    global_scale: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """:return: what it consists of, by the names of the parameters"""
        tensors = {"values": self.values, "scale": self.scale, "zero_point": self.zero_point}
        return (
            tensors if self.global_scale is None else tensors | {"global_scale": self.global_scale}
        )

    def dequantize(self) -> Tensor:
        """:return: ``(q - z) * s``, (out_features, in_features), the weight's dtype"""
        scale = self.scale.float().view(-1, 1)
        if self.global_scale is not None:
            scale = scale / self.global_scale
        steps = self.grouping.split(self.values).float() - self.zero_point.view(-1, 1)
        return self.grouping.join(steps.mul_(scale).to(self.scale.dtype))


class RoundingFormat(ABC):
    """
    The tuned state of one weight. Before `make_trainable` it rounds to nearest.

    :ivar num_bits: bits of one value
    :ivar is_integer: whether its values are evenly spaced
    :ivar rounding: V, or None
    :ivar clipping: alpha and beta, or empty
    :ivar searched: whether the clipping range was found by a search; if not, it is the observed one
    """

    num_bits: int
    is_integer: bool = True
    searched: bool = False

    def __init__(self) -> None:
        self.rounding: Tensor | None = None
        self.clipping: list[Tensor] = []

    @property
    def clipping_limit(self) -> float:
        """
        Upper limit of alpha and beta; the lower one is 0. A searched range may also grow
        (SignRoundV2); the observed one only shrinks.
        """
        return 2.0 if self.searched else 1.0

    @abstractmethod
    def make_trainable(self, tune_clipping: bool | None = None) -> None:
        """
        Create V (zeros) and perhaps alpha and beta (ones).

        :param tune_clipping: whether to learn alpha and beta; None for what suits the format
        """

    @abstractmethod
    def quantized(self) -> QuantizedWeight:
        """:return: the weight as it would be saved now, in tensors of its own"""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """:return: `quantized`, dequantized: (out_features, in_features), the weight's dtype"""

    @abstractmethod
    def descend(self, gradient: Tensor, rounding_lr: Tensor, clipping_lr: Tensor) -> None:
        """
        One sign-gradient step, in place: ``p <- p - lr * sign(dL/dp)`` for V, alpha and beta. For V
        each weight may have a factor of its own.

        :param gradient: dL/dW of the dequantized weight, (out_features, in_features)
        :param rounding_lr: step size of V, scalar
        :param clipping_lr: step size of alpha and beta, scalar
        """
