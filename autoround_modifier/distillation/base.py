"""What the distiller trains, whatever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from torch import nn

__all__ = ["TrainedValue"]


class TrainedValue(ABC):
    """
    A tensor of the model, trained in float32 relative to its own mean size, so that one step size
    fits all of them.

    :ivar factor: the parameter that an optimizer updates, float32
    """

    factor: nn.Parameter

    @abstractmethod
    def trained(self) -> AbstractContextManager[None]:
        """Let the model compute in a way that gives `factor` its gradient."""

    @abstractmethod
    def pull_gradient(self) -> None:
        """Called after the backward passes of a step, before the optimizer's."""

    @abstractmethod
    def apply(self) -> None:
        """Give the model the value of `factor`, rounded to the dtype it is saved in."""

    @abstractmethod
    def reset(self) -> None:
        """Give the model its first value again."""
