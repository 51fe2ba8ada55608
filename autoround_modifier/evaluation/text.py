"""The text that models are compared on, which calibration must not have seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from autoround_modifier.calibration import read_samples
from autoround_modifier.errors import CalibrationError, EvaluationError
from autoround_modifier.report.schema import DataRecord, TextRecord
from autoround_modifier.runs.calibration_data import calibration_digest

__all__ = ["PACKAGED", "EvaluationText", "check_not_calibrated_on", "read_text"]

# Written for this package; no recipe calibrates on it.
PACKAGED = Path(__file__).with_name("text.jsonl")


@dataclass(frozen=True)
class EvaluationText:
    """
    :param samples: (tokens,) each, int64, token ids
    :param record: what the report says of them
    """

    samples: list[Tensor]
    record: TextRecord


def read_text(
    path: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    length: int,
    match: Mapping[str, str] | None = None,
) -> EvaluationText:
    """
    :param path: file as for calibration data (JSON lines, CSV, Parquet, plain text); None for the
        packaged text, some 3,000 tokens
    :param num_samples: largest number of samples
    :param length: tokens of each sample
    :param match: columns and the values that a row must have
    :raises EvaluationError: if there is no text
    """
    source = path or PACKAGED
    if not source.is_file():
        raise EvaluationError(f"evaluation text: there is no file {source}")
    if num_samples < 1 or length < 2:
        raise EvaluationError(
            f"{num_samples} samples of {length} tokens asked for; use at least 1 of 2 tokens"
        )
    try:
        rows = read_samples(
            source, tokenizer, num_samples, length, default_samples=num_samples, match=match
        )
    except CalibrationError as error:
        raise EvaluationError(f"evaluation text: {error}") from error
    ids = [list(row) for row in rows["input_ids"] if len(row) > 1]
    record = TextRecord(
        source=str(path) if path else "the packaged text",
        digest=calibration_digest([{"input_ids": [row]} for row in ids]),
        samples=len(ids),
        length=max(map(len, ids)),
    )
    return EvaluationText([torch.tensor(row) for row in ids], record)


def check_not_calibrated_on(
    text: TextRecord, data: DataRecord | None, match: Mapping[str, str] | None = None
) -> None:
    """
    :param text: to be evaluated on
    :param data: of calibration, where that is known
    :param match: chooses rows of the text
    :raises EvaluationError: if the samples, or all rows of the file, are those of calibration. If
        some rows of the same file were chosen, a warning is logged
    """
    if data is None:
        return
    remedy = "give a text that calibration did not see, by `--text`"
    if text.digest == data.digest:
        raise EvaluationError(f"{text.source} is what the model was calibrated on; {remedy}")
    if data.source is None or Path(data.source).resolve() != Path(text.source).resolve():
        return
    if not match:
        raise EvaluationError(
            f"the model was calibrated on text from {text.source}; {remedy}, or choose other rows "
            "of it by `--match COLUMN=VALUE`"
        )
    logger.warning(
        f"calibration read {text.source} too: see to it that it used other rows than "
        + ", ".join(f"{column}={value}" for column, value in match.items())
    )
