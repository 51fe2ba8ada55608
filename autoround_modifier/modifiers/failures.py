"""What is said of a run that has stopped, or has tuned nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from loguru import logger
from torch import nn

from autoround_modifier.errors import listed
from autoround_modifier.progress.block_report import BlockReport

__all__ = ["nothing_tuned", "say_what_is_left", "what_is_left"]


@contextlib.contextmanager
def say_what_is_left(message: str) -> Iterator[None]:
    """:param message: logged if an error, or Ctrl-C, ends what runs inside"""
    try:
        yield
    except BaseException:  # Ctrl-C among them
        logger.error(message)
        raise


def what_is_left(
    done: int, total: int, groups: int, checkpoint_dir: str | None, only_modifier: bool
) -> str:
    """
    :param done: layers that are quantized
    :param total: layers that would be
    :param groups: finished groups of blocks
    :param checkpoint_dir: where these are kept; None for nowhere
    :param only_modifier: whether the recipe has no other modifier
    :return: what an AutoRoundModifier that has stopped leaves, and how to go on
    """
    if checkpoint_dir is not None:
        kept = (
            f"{groups} finished groups of blocks are kept in {checkpoint_dir}: the same run "
            "(model, recipe, data) goes on after them."
        )
    else:
        kept = "Nothing was saved: a run with `checkpoint_dir` could go on where it stopped."
    if done:
        model = "The model in memory is partly quantized: load it again before the next attempt"
    elif only_modifier:
        model = "The model in memory is as it was"
    else:
        model = "Other modifiers may have changed the model in memory: load it again"
    return f"AutoRound stopped with {done} of {total} layers quantized. {model}. {kept}"


def nothing_tuned(
    iters: int | None, blocks: Collection[nn.Module], reports: Collection[BlockReport]
) -> str:
    """
    :param iters: of the recipe
    :param blocks: of the model
    :param reports: of blocks that could not be tuned
    :return: why no block was tuned, and what to do
    """
    failures = [str(report.failure) for report in reports]
    if failures:
        reason = f"in every block there was NaN or infinity ({failures[0]})"
    else:
        kinds = sorted({type(block).__name__ for block in blocks})
        reason = (
            f"none of {len(blocks)} blocks ({listed(kinds)}) ran once for each sample with a layer "
            "to tune"
        )
    return (
        f"`iters` is {iters}, but no block was tuned: {reason}. Give `sequential_targets` of "
        "`oneshot` the class of blocks that run one after the other, pass "
        '`pipeline="basic"`, or ask for no tuning (`preset: opt_rtn`).'
    )
