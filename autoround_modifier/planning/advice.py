"""Which changes make a run fit, found by computing it again with each of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autoround_modifier.planning.settings import RunSettings

__all__ = ["Change", "changes_that_fit"]

SHORTEST = 256  # tokens of a sample
FEWEST = 32  # samples


@dataclass(frozen=True)
class Change:
    """
    :ivar text: what the user changes, and to what
    :ivar settings: fields of `RunSettings` after it
    """

    text: str
    settings: dict[str, Any]

    def applied(self, run: RunSettings) -> RunSettings:
        """:return: the settings with the change"""
        return replace(run, **self.settings)


def changes_that_fit(run: RunSettings, fits: Callable[[RunSettings], bool]) -> list[Change]:
    """
    :param run: does not fit
    :param fits: whether other settings do
    :return: of each kind of change, the mildest that suffices by itself; if none does, the mildest
        combination; nothing if there is none
    """
    kinds = [changes for changes in _kinds(run) if changes]
    alone = [
        next((change for change in changes if fits(change.applied(run))), None) for changes in kinds
    ]
    found = [change for change in alone if change is not None]
    if found:
        return found
    for number in range(2, len(kinds) + 1):
        for combination in _combinations(kinds, number):
            together = _joined(combination)
            if fits(together.applied(run)):
                return [together]
    return []


def _combinations(kinds: Sequence[Sequence[Change]], number: int) -> Iterator[tuple[Change, ...]]:
    """Yield one change of each of ``number`` kinds, mild ones first."""
    found: list[tuple[int, int, tuple[Change, ...]]] = []
    for chosen in itertools.combinations(kinds, number):
        names = [frozenset(changes[0].settings) for changes in chosen]
        if len(frozenset().union(*names)) < sum(map(len, names)):
            continue  # two of them change one field
        for indices in itertools.product(*(range(len(changes)) for changes in chosen)):
            picked = tuple(changes[i] for changes, i in zip(chosen, indices, strict=True))
            found.append((sum(indices), len(found), picked))
    for _, _, picked in sorted(found, key=lambda one: one[:2]):
        yield picked


def _joined(changes: Sequence[Change]) -> Change:
    settings: dict[str, Any] = {}
    for change in changes:
        settings |= change.settings
    return Change("; ".join(change.text for change in changes), settings)


def _kinds(run: RunSettings) -> Iterator[list[Change]]:
    """Yield the changes of each kind, mild ones first: those that do not change results first."""
    if not run.model_on_disk:
        text = 'model on the disk: load it with `device_map="auto_offload"`'
        yield [Change(text, {"model_on_disk": True})]
    if run.offload_device == "none":
        yield [Change("offload_device cpu", {"offload_device": "cpu"})]
    if run.iters:
        yield list(_smaller_batches(run, accumulate=True))
        yield list(_smaller_batches(run, accumulate=False))
    if run.samples:
        yield [
            Change(f"num_calibration_samples {n}", {"samples": n})
            for n in _halves(run.samples, FEWEST)
        ]
        yield [Change(f"max_seq_length {n}", {"length": n}) for n in _halves(run.length, SHORTEST)]
    if run.checkpoint_dir:
        yield [Change("no checkpoint_dir", {"checkpoint_dir": False})]
    if run.distillation_batch > 1:
        yield [
            Change(f"batch_size {n} of ScaleDistillationModifier", {"distillation_batch": n})
            for n in _halves(run.distillation_batch, 1)
        ]
    if run.distillation_iters:
        yield [Change("no ScaleDistillationModifier", {"distillation_iters": 0})]
    if run.iters:
        yield [Change("preset opt_rtn, which tunes nothing", {"iters": 0})]


def _smaller_batches(run: RunSettings, accumulate: bool) -> Iterator[Change]:
    for size in _halves(run.batch_size, 1):
        steps = run.gradient_accumulate_steps * (run.batch_size // size)
        if accumulate:
            text = f"batch_size {size} with gradient_accumulate_steps {steps}"
            yield Change(text, {"batch_size": size, "gradient_accumulate_steps": steps})
        else:
            text = f"batch_size {size}, which makes steps of fewer samples"
            yield Change(text, {"batch_size": size})


def _halves(value: int, least: int) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found
