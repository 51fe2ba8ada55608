"""The progress bar of tuning."""

from __future__ import annotations

from tqdm import tqdm

__all__ = ["TuningProgress"]


class TuningProgress:
    """
    :param total: sign-gradient steps of all blocks; the bar appears with the first of them
    """

    def __init__(self, total: int = 0):
        self.total = total
        self._bar: tqdm | None = None

    def advance(self, steps: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=self.total, desc="AutoRound", unit="it", smoothing=0.05)
        self._bar.update(steps)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
