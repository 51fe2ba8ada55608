"""Progress of a run on a terminal: what is being done, one line for each block, the time left."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from autoround_modifier.progress.events import (
    BlockFinished,
    Event,
    PhaseEnded,
    PhaseStarted,
    StepsDone,
    StepsPlanned,
)
from autoround_modifier.readable import duration_text

__all__ = ["RunProgress"]

# What a phase is called while it lasts
DOING = {
    "generation": "writing calibration text",
    "choosing": "choosing schemes",
    "capture": "running blocks in full precision",
    "search": "searching scales",
    "rounding": "rounding",
    "tuning": "tuning",
    "advancing": "running quantized blocks",
    "distillation": "training scales end to end",
    "saving": "saving",
}
# Phases that are worth a line of their own
ANNOUNCED = ("generation", "choosing", "capture", "distillation", "saving")


class RunProgress:
    """
    A listener of `progress.events`. On a terminal a bar shows the phase and the time left;
    elsewhere only the lines are written.

    :param console: to write to
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("preparing", total=None, left="")
        self._phases = ["preparing"]
        self._since = 0.0
        self._total = self._done = self._num_blocks = self._blocks = 0

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case PhaseStarted(name):
                self._phases.append(DOING.get(name, name))
                if name in ANNOUNCED:
                    self.line(f"{self._phases[-1]} ...")
            case PhaseEnded():
                if len(self._phases) > 1:
                    self._phases.pop()
            case StepsPlanned(_, total, blocks):
                self._total, self._num_blocks = total, blocks
                self._done, self._blocks, self._since = 0, 0, time.monotonic()
            case StepsDone(_, steps):
                self._done += steps
            case BlockFinished(name, report, restored):
                self._blocks += len(name.split(", "))
                text = name if report is None else str(report)
                found = ", found finished" if restored else ""
                self.line(f"[{self._blocks}/{self._num_blocks}] {text}{found}{self._left(', ')}")
        self._update()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _update(self) -> None:
        self._bar.update(
            self._task,
            description=self._phases[-1],
            total=self._total or None,
            completed=self._done,
            left=self._left(),
        )

    def _left(self, before: str = "") -> str:
        """:return: how long the stage will still take, from the steps that it has taken"""
        if not self._done or self._done >= self._total:
            return ""
        seconds = (time.monotonic() - self._since) * (self._total - self._done) / self._done
        return f"{before}about {duration_text(seconds)} left"
