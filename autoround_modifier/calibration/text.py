"""Calibration samples from texts and conversations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from loguru import logger
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from autoround_modifier.calibration.documents import Tokenization, content_of
from autoround_modifier.calibration.mixture import data_recipes, interleaved, read_mixture, shares
from autoround_modifier.calibration.packing import Packer
from autoround_modifier.calibration.records import DATA_SUFFIXES, Record, file_kind
from autoround_modifier.calibration.sources import (
    DataSource,
    HubAccess,
    described,
    holds_text,
    is_dataset,
    may_be_on_hub,
)
from autoround_modifier.calibration.tokens import Sample, token_dataset
from autoround_modifier.errors import CalibrationError

__all__ = ["check_text_name", "is_text_source", "read_samples", "text_dataset"]


def text_dataset(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    num_samples: int | None = None,
    max_seq_length: int = 2048,
    text_column: str | None = None,
    add_bos_token: bool | None = None,
    *,
    packing: bool = True,
    assistant_only_loss: bool = False,
    **match: Any,
) -> Dataset:
    """
    Make calibration samples of texts or conversations.

    Every document is cut into samples of ``max_seq_length`` tokens. The first pieces of all
    documents come first, then the second pieces, and so on, so that few samples still come from
    many documents. Documents that are shorter are joined, with the tokenizer's EOS between them,
    until a sample is full, and so are the rests of long ones. Reading stops when no later document
    can contribute. The same arguments give the same samples. What is used and what is left out is
    logged.

    :param source: a file (``.jsonl``, ``.json``, ``.csv``, ``.parquet``, else plain text; also
        ``.gz``), a folder, or the name of a dataset on the Hugging Face Hub; a dataset; a list of
        texts or of rows; a list of mappings with ``path`` and ``num_samples`` (a mixture), the path
        of a YAML file of one, or the name of a shipped one (``"chat"``, ``"code"``, ``"mixed"``)
    :param tokenizer: of the model to calibrate, or its processor
    :param num_samples: largest number of samples; None takes what the sources of a mixture add up
        to, or 128
    :param max_seq_length: tokens in each sample, special ones included; at most the tokenizer's
        ``model_max_length``
    :param text_column: column that holds the text, or the messages of a conversation, which the
        tokenizer's chat template writes; None takes the first of ``text``, ``messages``,
        ``conversations`` and ``content`` that holds something. Null and empty texts are skipped.
    :param add_bos_token: whether each sample of text begins with BOS; None does what the tokenizer
        does with a text. Conversations begin as the chat template begins them.
    :param packing: join short documents; else each is a sample of its own, if it has 16 tokens (or
        half of ``max_seq_length``)
    :param assistant_only_loss: let only what the assistant says in conversations count; needs a
        chat template with ``{% generation %}``
    :param match: keep only rows with these values, for example ``split="calib"``
    :return: dataset with ``input_ids``, ``attention_mask`` and, with ``assistant_only_loss``,
        ``loss_mask``, which `oneshot` takes as it is
    :raises CalibrationError: if a row cannot be read (with file and line), or there is no text
    """
    return read_samples(
        source,
        tokenizer,
        num_samples,
        max_seq_length,
        default_samples=128,
        text_column=text_column,
        add_bos_token=add_bos_token,
        packing=packing,
        assistant_only_loss=assistant_only_loss,
        match=match,
    )


def read_samples(
    source: Any,
    tokenizer: Any,
    num_samples: int | None,
    max_seq_length: int | None,
    *,
    default_samples: int,
    text_column: str | None = None,
    add_bos_token: bool | None = None,
    packing: bool = True,
    assistant_only_loss: bool = False,
    match: Mapping[str, Any] | None = None,
    name: str | None = None,
    split: str | None = None,
    hub: HubAccess | None = None,
) -> Dataset:
    """
    `text_dataset`, with more arguments.

    :param max_seq_length: None for 2048, or less if the tokenizer's ``model_max_length`` is
    :param default_samples: in place of ``num_samples``, if that is None and nothing else says it
    :param name: configuration of a dataset of the Hub or of a folder
    :param split: of a dataset of the Hub, a folder, or a `DatasetDict`
    :param hub: how the Hub may be reached
    """
    if num_samples is not None and num_samples < 1:
        raise CalibrationError(f"{num_samples} calibration samples asked for; use at least 1")
    tokenization = Tokenization(tokenizer, add_bos_token, assistant_only_loss)
    length = _length(max_seq_length, tokenization)
    sources = read_mixture(source) or [DataSource(source, name=name, split=split)]
    parts = []
    for one, count in zip(sources, shares(sources, num_samples, default_samples), strict=True):
        if count == 0:
            logger.warning(f"{described(one.path)}: its share of {num_samples} samples is none")
            continue
        packer = Packer(length, count, packing)
        columns = {**(match or {}), **one.match}
        parts.append(
            _samples(
                one,
                one.records(hub or HubAccess()),
                one.text_column or text_column,
                columns,
                tokenization,
                packer,
            )
        )
    samples = interleaved(parts)
    if assistant_only_loss and all(sample.loss_mask is None for sample in samples):
        raise CalibrationError(
            "assistant_only_loss: the calibration data are texts, not conversations; name the "
            "column of the messages with `text_column`, or leave `assistant_only_loss` out"
        )
    return token_dataset(samples)


def _length(max_seq_length: int | None, tokenization: Tokenization) -> int:
    """:return: tokens of a sample that the tokenizer's model can take"""
    limit = tokenization.tokenizer.model_max_length
    if max_seq_length is None:
        max_seq_length = min(2048, limit)
    if max_seq_length > limit:
        logger.warning(
            f"max_seq_length is {max_seq_length}, and the tokenizer's model_max_length {limit}; "
            f"samples have {limit} tokens"
        )
        max_seq_length = limit
    fewest = len(tokenization.first) + 1
    if max_seq_length < max(2, fewest):
        raise CalibrationError(f"max_seq_length is {max_seq_length}; use at least {fewest + 1}")
    return max_seq_length


def _samples(
    source: DataSource,
    records: Any,
    text_column: str | None,
    match: Mapping[str, Any],
    tokenization: Tokenization,
    packer: Packer,
) -> list[Sample]:
    """:return: at least one sample of a source; what is used and left out is logged"""
    rows = empty = 0
    record = None
    for record in records:
        rows += 1
        if not _matches(record, match):
            continue
        content = content_of(record, text_column)
        document = None if content is None else tokenization(content, record)
        if document is None or not document.ids:
            empty += 1
            continue
        packer.add(document)
        if packer.full:
            break
    samples = packer.samples()
    name = described(source.path)
    if not samples:
        raise CalibrationError(f"{name}: {_why_none(record, rows, empty, match, packer)}")
    _report(name, samples, rows, empty, packer)
    return samples


def _matches(record: Record, match: Mapping[str, Any]) -> bool:
    row = record.value if isinstance(record.value, Mapping) else {}
    return all(column in row and row[column] == value for column, value in match.items())


def _why_none(
    last: Record | None, rows: int, empty: int, match: Mapping[str, Any], packer: Packer
) -> str:
    """:param last: row that was read, if there is one"""
    if last is None:
        return "the calibration dataset is empty"
    if not packer.num_documents and not empty:
        wanted = ", ".join(f"{column}={value!r}" for column, value in match.items())
        columns = sorted(map(str, last.value)) if isinstance(last.value, Mapping) else "no columns"
        return f"none of {rows} rows has {wanted}; the last one has {columns}"
    if not packer.num_documents:
        return f"none of {rows} rows holds any text"
    if packer.num_silent:
        return f"the assistant says nothing in {packer.num_documents} conversations"
    return (
        f"{packer.num_documents} documents have fewer than the {packer.fewest_tokens} tokens of "
        "the shortest sample. Use longer documents"
        + (", or `packing=True`." if not packer.packing else ".")
    )


def _report(name: str, samples: list[Sample], rows: int, empty: int, packer: Packer) -> None:
    num_tokens = sum(len(sample.ids) for sample in samples)
    shorter = sum(len(sample.ids) < packer.length for sample in samples)
    message = (
        f"{name}: {len(samples)} samples of {packer.length} tokens"
        + (f", {shorter} of them shorter" if shorter else "")
        + f"; {num_tokens} tokens of {packer.num_documents} documents in {rows} rows"
    )
    left_out = [
        f"{count} {what}"
        for count, what in (
            (empty, "rows without text"),
            (packer.num_short, f"documents or rests of fewer than {packer.fewest_tokens} tokens"),
            (packer.num_silent, "samples in which the assistant says nothing"),
        )
        if count
    ]
    if left_out:
        message += f"; left out: {', '.join(left_out)}"
    if len(samples) < packer.num_samples:
        message += f"; up to {packer.num_samples} samples were wanted"
        if packer.packing and len(samples) < packer.num_documents:
            message += ", a smaller `max_seq_length` or `packing=False` would give more"
    log = logger.warning if left_out or len(samples) < packer.num_samples else logger.info
    log(message)


def check_text_name(name: str) -> None:
    """
    :param name: of a text source, not yet read
    :raises CalibrationError: if nothing can be there
    """
    there = bool(name) and Path(name).expanduser().exists()
    if not there and name not in data_recipes() and not may_be_on_hub(name):
        raise CalibrationError(f"calibration data: no file or folder `{name}`")


def is_text_source(dataset: Any, text_column: str | None = None) -> bool:
    """
    Whether `text_dataset` makes samples of it; everything else is for LLM-Compressor.

    :param dataset: argument of `oneshot`
    :raises CalibrationError: if it is a dataset without any column that could be used
    """
    if isinstance(dataset, str):
        path = Path(dataset).expanduser()
        return (
            (bool(dataset) and path.exists())
            or "/" in dataset
            or os.sep in dataset
            or dataset in data_recipes()
            or file_kind(path) in (*DATA_SUFFIXES, ".yaml", ".yml")
        )
    if isinstance(dataset, os.PathLike):
        return True
    if is_dataset(dataset):
        return holds_text(dataset, text_column)
    return isinstance(dataset, (list, tuple, Mapping))
