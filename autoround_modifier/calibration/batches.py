"""Batches of samples of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PaddedBatch"]


@dataclass(frozen=True)
class PaddedBatch:
    """
    A data collator that pads to the longest sample. LLM-Compressor's cuts all samples of a batch to
    the shortest, or pads without ``loss_mask``.

    :param pad_token_id: id in ``input_ids`` of padding, which the masks exclude
    """

    pad_token_id: int

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> PaddedBatch:
        """:param tokenizer: or the processor that holds it; it may lack a padding token"""
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        return cls(tokenizer.pad_token_id or tokenizer.eos_token_id or 0)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        :param features: samples of token ids and masks, each of its own length
        :return: column -> (batch, length of the longest), int64; 0 in masks where padded
        """
        length = max(len(feature["input_ids"]) for feature in features)
        batch = {}
        for column in features[0]:
            filler = self.pad_token_id if column == "input_ids" else 0
            batch[column] = torch.tensor(
                [
                    [*feature[column], *[filler] * (length - len(feature[column]))]
                    for feature in features
                ]
            )
        return batch
