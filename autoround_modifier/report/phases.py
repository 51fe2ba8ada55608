"""Seconds and peak memory of the phases of a run."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import psutil

from autoround_modifier.device import peak_memory, reset_peak_memory
from autoround_modifier.report.schema import PhaseRecord

__all__ = ["PhaseClock"]

SAMPLING_SECONDS = 0.1


@dataclass
class _Total:
    seconds: float = 0.0
    host: int = 0
    device: int = 0


class PhaseClock:
    """
    Time belongs to the innermost phase that is open, until `stop`. The resident size of the process
    is sampled by a thread, ten times a second, from `start` on.

    :param first: the phase that is open from the start, around all others
    """

    def __init__(self, first: str) -> None:
        self._open = [first]
        self._totals: dict[str, _Total] = {first: _Total()}
        self._process = psutil.Process()
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._since = time.perf_counter()

    def start(self) -> None:
        reset_peak_memory()
        self._sampler.start()

    def stop(self) -> None:
        if not self._stopped.is_set():
            self._account()
            self._stopped.set()
            if self._sampler.is_alive():
                self._sampler.join()

    def enter(self, name: str) -> None:
        self._account()
        self._open.append(name)
        self._totals.setdefault(name, _Total())

    def leave(self, name: str) -> None:
        """Phases inside of it that were never closed, because a run stopped, end as well."""
        self._account()
        if name in self._open[1:]:
            del self._open[len(self._open) - 1 - self._open[::-1].index(name) :]

    def records(self) -> list[PhaseRecord]:
        """:return: the phases up to now, in the order in which they first began"""
        self._account()
        return [
            PhaseRecord(
                name=name,
                seconds=round(total.seconds, 3),
                peak_host_bytes=total.host,
                peak_device_bytes=total.device,
            )
            for name, total in self._totals.items()
        ]

    def _account(self) -> None:
        if self._stopped.is_set():
            return
        now = time.perf_counter()
        total = self._totals[self._open[-1]]
        total.seconds += now - self._since
        total.host = max(total.host, self._process.memory_info().rss)
        total.device = max(total.device, peak_memory())
        reset_peak_memory()
        self._since = now

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLING_SECONDS):
            total = self._totals[self._open[-1]]
            total.host = max(total.host, self._process.memory_info().rss)
