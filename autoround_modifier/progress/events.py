"""
What happens during a run, for whoever listens: progress bars and reports. Code that quantizes
publishes; it does not know who listens, and nobody has to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

from autoround_modifier.progress.block_report import BlockReport

__all__ = [
    "BlockFinished",
    "CalibrationDataFound",
    "Event",
    "LayerQuantized",
    "Listener",
    "PhaseEnded",
    "PhaseStarted",
    "Result",
    "StepsDone",
    "StepsPlanned",
    "is_anyone_listening",
    "listening",
    "phase",
    "publish",
]


@dataclass(frozen=True)
class PhaseStarted:
    """
    :ivar name: ``generation`` (of calibration text), ``choosing``, ``capture``, ``search``,
        ``rounding``, ``tuning``, ``advancing``, ``distillation`` or ``saving``. A phase inside of
        another interrupts it
    """

    name: str


@dataclass(frozen=True)
class PhaseEnded:
    name: str


@dataclass(frozen=True)
class StepsPlanned:
    """
    :ivar phase: that will take the steps
    :ivar total: number of them
    :ivar blocks: number of blocks that they are for; 0 if they are not for blocks
    """

    phase: str
    total: int
    blocks: int


@dataclass(frozen=True)
class StepsDone:
    """
    :ivar steps: since the last event of this kind, of the same phase
    """

    phase: str
    steps: int


@dataclass(frozen=True)
class CalibrationDataFound:
    """
    :ivar batches: that calibrate; they may be read again
    """

    batches: object


@dataclass(frozen=True)
class LayerQuantized:
    """
    :ivar name: of a layer whose weight has just been replaced by its quantized one
    :ivar weight_error: squared error of the weight, relative to its squared length
    """

    name: str
    weight_error: float


@dataclass(frozen=True)
class BlockFinished:
    """
    :ivar report: None where nothing was tuned
    :ivar restored: it was found in ``checkpoint_dir``
    """

    name: str
    report: BlockReport | None
    restored: bool


@dataclass(frozen=True)
class Result:
    """
    :ivar phase: that ended with it
    :ivar value: `schemes.Choice` of ``choosing``, `distillation.DistillationResult` of
        ``distillation``
    """

    phase: str
    value: Any


Event: TypeAlias = (
    PhaseStarted
    | PhaseEnded
    | StepsPlanned
    | StepsDone
    | CalibrationDataFound
    | LayerQuantized
    | BlockFinished
    | Result
)
Listener: TypeAlias = Callable[[Event], None]

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """
    :param listener: called with each event that is published inside, in the same thread
    """
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def is_anyone_listening() -> bool:
    """Asked before something is computed for an event alone."""
    return bool(_listeners.get())


def publish(event: Event) -> None:
    for listener in _listeners.get():
        listener(event)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """:param name: see `PhaseStarted`"""
    publish(PhaseStarted(name))
    try:
        yield
    finally:
        publish(PhaseEnded(name))
