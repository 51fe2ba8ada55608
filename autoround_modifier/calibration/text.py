"""Calibration text from a file: documents, cut into samples of equal length."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from autoround_modifier.errors import CalibrationError

__all__ = ["first_tokens", "text_dataset", "token_dataset"]


def text_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 128,
    max_seq_length: int = 2048,
    text_column: str = "text",
    add_bos_token: bool | None = None,
    **match: str,
) -> Dataset:
    """
    Cut the documents of a text file into samples of equal length.

    Every document is cut into pieces of ``max_seq_length`` tokens; a shorter rest is dropped. The
    first pieces of all documents come first, then the second pieces, and so on, so that few
    samples still come from many documents. Reading stops when no later document can contribute.

    :param path: ``.jsonl`` (one JSON object per line), ``.json`` (the same, or one array of
        objects), or any other file as one document of plain text; UTF-8
    :param tokenizer: of the model to calibrate
    :param num_samples: largest number of samples
    :param max_seq_length: tokens in each sample, BOS included
    :param text_column: field of a JSON object that holds the text
    :param add_bos_token: whether each sample begins with BOS; None does what the tokenizer does
        with a text
    :param match: keep only JSON objects with these values, for example ``split="calib"``
    :return: dataset with ``input_ids`` and ``attention_mask``, which `oneshot` takes as it is
    :raises CalibrationError: if a document cannot be read (with file and line), or none has
        ``max_seq_length`` tokens
    """
    path = Path(path)
    prefix = first_tokens(tokenizer, add_bos_token)
    length = max_seq_length - len(prefix)
    if length < 1:
        raise CalibrationError(f"max_seq_length is {max_seq_length}; use at least 2")
    documents: list[list[list[int]]] = []
    num_read = 0
    for text in _documents(path, text_column, match):
        num_read += 1
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        starts = range(0, len(ids) - length + 1, length)
        if starts:
            documents.append([prefix + ids[start : start + length] for start in starts])
        if len(documents) == num_samples:
            break
    if not documents:
        raise CalibrationError(
            f"{path}: none of {num_read} documents has {max_seq_length} tokens. Use a smaller "
            "`max_seq_length` or longer documents."
        )
    rounds = max(map(len, documents))
    samples = [
        pieces[index] for index in range(rounds) for pieces in documents if index < len(pieces)
    ]
    return token_dataset(samples[:num_samples])


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None = None
) -> list[int]:
    """
    :param add_bos_token: None does what the tokenizer does with a text
    :return: the BOS id if texts begin with it, else nothing
    :raises CalibrationError: if BOS is asked for and the tokenizer has none
    """
    bos = tokenizer.bos_token_id
    if add_bos_token is None:
        ids = tokenizer("a")["input_ids"]
        add_bos_token = bos is not None and len(ids) > 0 and ids[0] == bos
    if add_bos_token and bos is None:
        raise CalibrationError("add_bos_token: the tokenizer has no BOS token")
    return [bos] if add_bos_token else []


def token_dataset(samples: list[list[int]]) -> Dataset:
    """:return: dataset with ``input_ids`` and ``attention_mask``; every token counts"""
    return Dataset.from_dict(
        {"input_ids": samples, "attention_mask": [[1] * len(sample) for sample in samples]}
    )


def _documents(path: Path, text_column: str, match: dict[str, str]) -> Iterator[str]:
    if path.suffix not in (".json", ".jsonl"):
        with _utf8(path):
            yield path.read_text(encoding="utf-8-sig")
        return
    for line, record in _records(path):
        if not isinstance(record, dict):
            raise CalibrationError(
                f"{path}:{line}: {_shown(record)} is not a JSON object with a field `{text_column}`"
            )
        if any(record.get(key) != value for key, value in match.items()):
            continue
        if text_column not in record:
            raise CalibrationError(
                f"{path}:{line}: no field `{text_column}`; this object has {sorted(record)}. Name "
                "the right one with `text_column`."
            )
        text = record[text_column]
        if not isinstance(text, str):
            raise CalibrationError(
                f"{path}:{line}: field `{text_column}` is {_shown(text)}, not a string"
            )
        yield text


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """
    Yield each value of a JSON-lines file or of a JSON array, with its line.

    :raises CalibrationError: with file and line, where the file is not JSON or not UTF-8
    """
    # "utf-8-sig" skips a byte order mark.
    with _utf8(path), path.open(encoding="utf-8-sig") as file:
        while (first := file.read(1)) and first.isspace():
            pass
        file.seek(0)
        if first == "[":
            yield from _array(path, file.read())
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise CalibrationError(
                        f"{path}:{number}: not a JSON value on one line ({error.msg}). Write one "
                        "object per line, or all of them as one array."
                    ) from error
                yield number, value


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a JSON array, each with the line on which it begins."""
    decoder = json.JSONDecoder()
    try:
        json.loads(text)  # an error anywhere in it is found before the first element is used
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while text[position].isspace() or text[position] == ",":
            position += 1
        if text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        element, position = decoder.raw_decode(text, position)
        yield line, element


@contextlib.contextmanager
def _utf8(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); convert it"
        ) from error


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
