"""Numbers of a plan, and how each is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Kind", "Phase", "Quantity", "largest", "total"]

Kind = Literal["counted", "measured", "extrapolated", "assumed"]


@dataclass(frozen=True)
class Quantity:
    """
    :ivar name: what it is
    :ivar value: bytes, or seconds
    :ivar kind: ``counted`` from shapes and the code; ``measured`` on this machine or in a
        benchmark that ``source`` names; ``extrapolated`` from such a measurement by the speed or
        size of other hardware; ``assumed``
    :ivar source: of what is not counted
    """

    name: str
    value: float
    kind: Kind = "counted"
    source: str = ""


@dataclass(frozen=True)
class Phase:
    """
    A time of the run at which these are there together.

    :ivar name: of the phase
    :ivar parts: bytes
    """

    name: str
    parts: tuple[Quantity, ...]

    @property
    def size(self) -> float:
        """Bytes of all parts."""
        return total(self.parts)


def total(parts: Iterable[Quantity]) -> float:
    """:return: sum of the values"""
    return sum(part.value for part in parts)


def largest(phases: Iterable[Phase]) -> Phase:
    """:return: the phase in which most is there"""
    return max(phases, key=lambda phase: phase.size)
