"""A progress bar whose steps are also published."""

from __future__ import annotations

from tqdm import tqdm

from autoround_modifier.runs.events import StepsDone, StepsPlanned, publish

__all__ = ["Progress"]


class Progress:
    """
    :param phase: that takes the steps, see `runs.events.PhaseStarted`
    :param total: number of steps; the bar appears with the first of them
    :param blocks: number of blocks that they are for, if they are for blocks
    :param title: of the bar
    :param unit: of a step
    """

    def __init__(
        self, phase: str, total: int, blocks: int = 0, *, title: str, unit: str = "it"
    ) -> None:
        self.phase = phase
        self.total = total
        self.title = title
        self.unit = unit
        self._bar: tqdm | None = None
        publish(StepsPlanned(phase, total, blocks))

    def advance(self, steps: int = 1) -> None:
        if self._bar is None:
            self._bar = tqdm(total=self.total, desc=self.title, unit=self.unit, smoothing=0.05)
        self._bar.update(steps)
        publish(StepsDone(self.phase, steps))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
