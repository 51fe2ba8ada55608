"""Batches of calibration samples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoround_modifier.calibration.checks import check_samples
from autoround_modifier.errors import CalibrationError

__all__ = ["PaddedBatch", "sample_batches"]


def sample_batches(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    :param samples: columns of each: numbers of one sample, or of a batch, (batch, tokens)
    :return: the samples as batches, (batch, tokens); single samples become batches of one
    :raises CalibrationError: if there is none, or one has the wrong columns or shapes
    """
    batches = []
    for sample in samples:
        batch = {key: torch.as_tensor(value) for key, value in sample.items()}
        single = batch["input_ids"].ndim == 1
        batches.append({key: value[None] for key, value in batch.items()} if single else batch)
    if not batches:
        raise CalibrationError("the calibration dataset is empty")
    check_samples(batches)
    return batches


@dataclass(frozen=True)
class PaddedBatch:
    """
    A data collator that pads to the longest sample. LLM-Compressor's cuts all samples of a batch to
    the shortest, or pads without ``loss_mask``.

    :param max_seq_length: largest number of tokens that is kept of a sample; None for all
    :param pad_token_id: id of padding, which the masks exclude
    """

    max_seq_length: int | None = None
    pad_token_id: int = 0

    @classmethod
    def fits(cls, columns: Collection[str]) -> bool:
        """:return: whether samples of these columns can be padded"""
        return "input_ids" in columns and set(columns) <= _COLUMNS

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        :param features: samples with ``input_ids`` and perhaps masks, each of its own length
        :return: column -> (batch, tokens of the longest), int64; masks are 0 where padded, and
            ``attention_mask`` is there if anything is
        """
        samples = [
            {
                name: torch.as_tensor(x).tolist()[: self.max_seq_length]
                for name, x in feature.items()
            }
            for feature in features
        ]
        lengths = [len(sample["input_ids"]) for sample in samples]
        if len(set(lengths)) > 1 and "attention_mask" not in samples[0]:
            for sample, length in zip(samples, lengths, strict=True):
                sample["attention_mask"] = [1] * length
        batch = {}
        for name in samples[0]:
            filler = self.pad_token_id if name == "input_ids" else 0
            rows = [x[name] + [filler] * (max(lengths) - len(x[name])) for x in samples]
            batch[name] = torch.tensor(rows)
        return batch


_COLUMNS = {"input_ids", "attention_mask", "loss_mask"}
