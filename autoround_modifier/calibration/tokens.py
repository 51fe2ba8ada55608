"""Special tokens that a tokenizer puts around a text, and datasets of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from autoround_modifier.errors import CalibrationError

__all__ = ["Sample", "first_tokens", "last_tokens", "token_dataset"]


class Sample(NamedTuple):
    """
    :param ids: token ids
    :param loss_mask: 1 for each token that counts, 0 for the others; None if all count
    """

    ids: list[int]
    loss_mask: list[int] | None = None


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None = None
) -> list[int]:
    """
    :param add_bos_token: None does what the tokenizer does with a text
    :return: the ids with which each text begins: BOS for Llama and Gemma, two tokens for GLM,
        nothing for Qwen
    :raises CalibrationError: if BOS is asked for and the tokenizer has none
    """
    if add_bos_token is None:
        return _around(tokenizer)[0]
    bos = tokenizer.bos_token_id
    if add_bos_token and bos is None:
        raise CalibrationError("add_bos_token: the tokenizer has no BOS token")
    return [bos] if add_bos_token else []


def last_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """:return: the ids with which the tokenizer ends each text; most end it with none"""
    return _around(tokenizer)[1]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """:return: special ids in front of a text, and behind it"""
    with_special = tokenizer("a", return_special_tokens_mask=True)
    ids, added = list(with_special["input_ids"]), list(with_special["special_tokens_mask"])
    if 0 in added and 1 in added:
        start, end = added.index(0), len(added) - added[::-1].index(0)
        return ids[:start], ids[end:]
    # Not all tokenizers say which ids they added.
    text = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(ids) - len(text) + 1):
        if ids[start : start + len(text)] == text:
            return ids[:start], ids[start + len(text) :]
    bos = tokenizer.bos_token_id
    return ([bos] if bos is not None and ids[:1] == [bos] else []), []


def token_dataset(samples: Sequence[Sample]) -> Dataset:
    """
    :return: dataset with ``input_ids`` and ``attention_mask``, in which every token counts, and
        ``loss_mask`` if a sample has one
    """
    columns = {
        "input_ids": [sample.ids for sample in samples],
        "attention_mask": [[1] * len(sample.ids) for sample in samples],
    }
    if any(sample.loss_mask is not None for sample in samples):
        columns["loss_mask"] = [sample.loss_mask or [1] * len(sample.ids) for sample in samples]
    return Dataset.from_dict(columns)
