"""What is put right in a checkpoint once LLM-Compressor has saved it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

__all__ = ["FINISHING_STEPS", "finish_checkpoint"]

FinishingStep = Callable[[PreTrainedModel, Path], None]

# In this order. Each takes the model, as it is after saving, and the folder with its files.
FINISHING_STEPS: tuple[FinishingStep, ...] = ()


def finish_checkpoint(model: PreTrainedModel, folder: Path) -> None:
    """
    :param model: that was saved; compressed
    :param folder: with all that LLM-Compressor wrote; files are changed and added
    """
    for step in FINISHING_STEPS:
        step(model, folder)
