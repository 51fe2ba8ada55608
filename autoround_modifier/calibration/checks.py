"""Samples of token ids that cannot calibrate: refused before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, Value
from loguru import logger
from torch import Tensor

from autoround_modifier.errors import CalibrationError

__all__ = ["check_loss_masks", "check_samples", "model_columns"]

_IDS = "input_ids"
_MASKS = ("attention_mask", "loss_mask")
# Columns of images and sound, with which ids of placeholders may stand among the token ids.
_MEDIA = ("_values", "_features", "_embeds")
# Rows that are read at a time.
_ROWS = 256

_WRONG = {
    "attention_mask": "attention_mask is zero everywhere",
    "loss_mask": "loss_mask excludes every token",
}
_REMEDY = {
    "attention_mask": "",
    "loss_mask": (
        ". A mask of what the assistant says is zero everywhere if the chat template has no "
        "{% generation %}."
    ),
}


def check_samples(data: Any, vocabulary_size: int | None = None) -> None:
    """
    Refuse samples that would end in an error without a place, or in a model tuned on nothing.

    :param data: dataset with ``input_ids`` and perhaps ``attention_mask`` and ``loss_mask``; or a
        list of such samples, (tokens,), or of batches, (batch, tokens). Anything else is not looked
        at.
    :param vocabulary_size: number of token ids that the model has an embedding for
    :raises CalibrationError: if a sample has no token, a mask of another length, or an id that the
        model does not have; or if no token counts in any sample
    """
    number = 0
    ignored = {"attention_mask": 0, "loss_mask": 0}  # samples, by the mask that leaves no token
    for row in _rows(data):
        number += 1
        ids = row[_IDS]
        if not len(ids):
            raise CalibrationError(f"calibration sample {number} has no token")
        if vocabulary_size is not None and not any(name.endswith(_MEDIA) for name in row):
            _check_ids(number, ids, vocabulary_size)
        counts = torch.ones_like(ids, dtype=torch.bool)
        for name in _MASKS:
            mask = row.get(name)
            if mask is None:
                continue
            if mask.shape != ids.shape:
                raise CalibrationError(
                    f"calibration sample {number}: {name} has {len(mask)} entries for {len(ids)} "
                    "tokens"
                )
            counts &= mask.bool()
            if not counts.any():
                ignored[name] += 1
                break
    found = [name for name, count in ignored.items() if count]
    message = " and ".join(
        f"{_WRONG[name]} in {ignored[name]} of {number} calibration samples" for name in found
    )
    if found and sum(ignored.values()) == number:
        remedy = "".join(_REMEDY[name] for name in found)
        raise CalibrationError(f"{message}, so that nothing would be tuned{remedy}")
    if found:
        logger.warning(f"{message}; they count for nothing")


def model_columns(data: Dataset) -> Dataset:
    """
    :param data: ready samples
    :return: without columns of which LLM-Compressor cannot make tensors: texts, structures, and
        labels of whole samples
    :raises CalibrationError: if token ids or a mask are null
    """
    left_out = [
        name
        for name, feature in data.features.items()
        if isinstance(feature, dict)
        or (isinstance(feature, Value) and (name == "labels" or feature.dtype == "string"))
    ]
    if left_out:
        logger.info(f"columns that are not for the model: {', '.join(left_out)}")
        data = data.remove_columns(left_out)
    table = data.data
    if any(table.column(name).null_count for name in (_IDS, *_MASKS) if name in data.column_names):
        check_samples(data)
    return data


def check_loss_masks(masks: Sequence[Tensor | None]) -> None:
    """
    :param masks: of all batches, (batch, tokens)
    :raises CalibrationError: if no token of any batch counts
    """
    if masks and all(mask is not None and not mask.any() for mask in masks):
        raise CalibrationError(
            f"{_WRONG['loss_mask']} in all {len(masks)} calibration batches, so that nothing would "
            f"be tuned{_REMEDY['loss_mask']}"
        )


def _check_ids(number: int, ids: Tensor, vocabulary_size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocabulary_size)]
    if len(wrong):
        raise CalibrationError(
            f"calibration sample {number} has token id {int(wrong[0])}, and the model has the ids "
            f"0 to {vocabulary_size - 1}. Use the tokenizer of the model."
        )


def _rows(data: Any) -> Iterator[dict[str, Any]]:
    """Yield the samples, as far as they are looked at: token ids and masks as tensors."""
    if isinstance(data, Dataset):
        if _IDS not in data.column_names:
            return
        names = [name for name in data.column_names if name in (_IDS, *_MASKS)]
        others = dict.fromkeys(set(data.column_names) - set(names))
        plain = data.select_columns(names).with_format(None)
        for start in range(0, len(plain), _ROWS):
            batch = plain[start : start + _ROWS]
            for index in range(len(batch[_IDS])):
                for name in names:
                    if batch[name][index] is None:
                        raise CalibrationError(
                            f"calibration sample {start + index + 1}: `{name}` is null"
                        )
                row = _tensors({name: batch[name][index] for name in names})
                if row[_IDS].ndim == 1:
                    yield others | row
    elif isinstance(data, (list, tuple)):
        for sample in data:
            if not isinstance(sample, Mapping) or sample.get(_IDS) is None:
                continue
            others = dict.fromkeys(set(sample) - {_IDS, *_MASKS})
            row = _tensors(sample)
            if row[_IDS].ndim == 1:
                yield others | row
            elif row[_IDS].ndim == 2:
                for index in range(len(row[_IDS])):
                    yield others | {name: value[index] for name, value in row.items()}


def _tensors(sample: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(sample[name])
        for name in (_IDS, *_MASKS)
        if sample.get(name) is not None
    }
