"""
Predictions of the original, kept on the disk while the quantized model makes its own, so that one
model at a time is in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoround_modifier.errors import EvaluationError, NonFiniteError
from autoround_modifier.evaluation.divergence import TokenStatistics, token_statistics
from autoround_modifier.readable import bytes_text

__all__ = ["compare_with_recorded", "record_predictions"]

LOGITS = "logits"


def record_predictions(model: nn.Module, samples: Sequence[Tensor], folder: Path) -> None:
    """
    :param model: the original
    :param samples: (tokens,) each, token ids
    :param folder: gets one file for each sample, (tokens - 1, vocabulary) in the model's dtype
    :raises EvaluationError: if the disk has too little room, found at the first sample
    :raises NonFiniteError: if the model gives NaN
    """
    for number, sample in enumerate(samples):
        logits = _logits(model, sample, "original").cpu().contiguous()
        if number == 0:
            _check_room(logits, samples, folder)
        save_file({LOGITS: logits}, _file(folder, number))


def compare_with_recorded(
    model: nn.Module, samples: Sequence[Tensor], folder: Path
) -> list[TokenStatistics]:
    """
    :param model: the quantized model
    :param samples: those of `record_predictions`
    :param folder: of `record_predictions`
    :raises NonFiniteError: if the model gives NaN
    :raises EvaluationError: if the models have vocabularies of different sizes
    """
    found = []
    for number, sample in enumerate(samples):
        recorded = load_file(_file(folder, number))[LOGITS]
        logits = _logits(model, sample, "quantized model")
        if recorded.shape != logits.shape:
            raise EvaluationError(
                f"the original predicts {recorded.shape[1]} tokens and the quantized model "
                f"{logits.shape[1]}: these are two different models"
            )
        found.append(token_statistics(recorded, logits, sample))
    return found


@torch.no_grad()
def _logits(model: nn.Module, sample: Tensor, which: str) -> Tensor:
    """:return: (tokens - 1, vocabulary)"""
    device = next(model.parameters()).device
    logits = model(input_ids=sample[None].to(device), use_cache=False).logits[0, :-1]
    if logits.isnan().any():
        raise NonFiniteError(f"the {which} predicts NaN; try `--dtype bfloat16` or `float32`")
    return logits


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"


def _check_room(logits: Tensor, samples: Sequence[Tensor], folder: Path) -> None:
    tokens = sum(len(sample) - 1 for sample in samples)
    needed = tokens * logits[0].numel() * logits.element_size()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EvaluationError(
            f"the original's predictions take {bytes_text(needed)}, and {folder} has "
            f"{bytes_text(free)} free; use fewer `--samples`, or name another disk by TMPDIR"
        )
