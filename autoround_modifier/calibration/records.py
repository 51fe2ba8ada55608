"""Rows of files: JSON lines, JSON arrays, CSV, Parquet and plain text, each with its place."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
from pyarrow import parquet

from autoround_modifier.errors import CalibrationError

__all__ = ["DATA_SUFFIXES", "Record", "file_kind", "read_records", "shown"]

_JSON = (".json", ".jsonl", ".ndjson")
DATA_SUFFIXES = (*_JSON, ".csv", ".parquet", ".txt", ".md")
# Characters of one CSV field; the default of 131,072 is less than long documents have.
_CSV_FIELD = 2**31 - 1


class Record(NamedTuple):
    """
    :param place: file and line, or number of the row, for messages
    :param value: a row, or a whole text
    """

    place: str
    value: Any


def file_kind(path: Path) -> str:
    """:return: the ending that says what the file holds, ``.jsonl`` of ``a.jsonl.gz``"""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def read_records(path: Path) -> Iterator[Record]:
    """
    Yield the rows of a file; a file of plain text is one row.

    :param path: ``.jsonl``, ``.ndjson`` or ``.json`` (one value per line, or one array), ``.csv``,
        ``.parquet``, or plain text; UTF-8; each but Parquet may be compressed (``.gz``)
    :raises CalibrationError: with file and line, where the file cannot be read
    """
    kind = file_kind(path)
    with _readable(path):
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind == ".csv":
            yield from _csv(path)
        elif kind in _JSON:
            yield from _json(path)
        else:
            with _text(path) as file:
                yield Record(str(path), file.read())


def shown(value: Any) -> str:
    """:return: a value as JSON, cut where it is long, for messages"""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _text(path: Path) -> IO[str]:
    # "utf-8-sig" skips a byte order mark. The csv module reads the ends of lines itself.
    newline = "" if file_kind(path) == ".csv" else None
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _parquet(path: Path) -> Iterator[Record]:
    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{path}: row {number}", row)


def _csv(path: Path) -> Iterator[Record]:
    limit = csv.field_size_limit(_CSV_FIELD)
    try:
        with _text(path) as file:
            reader = csv.DictReader(file, strict=True)
            line = 2
            try:
                for row in reader:
                    row.pop(None, None)  # fields without a name
                    yield Record(f"{path}:{line}", row)
                    line = reader.line_num + 1
            except csv.Error as error:
                raise CalibrationError(f"{path}:{line}: not valid CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _json(path: Path) -> Iterator[Record]:
    with _text(path) as file:
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
                yield Record(f"{path}:{number}", value)


def _array(path: Path, text: str) -> Iterator[Record]:
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
        yield Record(f"{path}:{line}", element)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}). Convert it, or give it "
            f"the ending of what it is; read are {', '.join(DATA_SUFFIXES)} and `.gz` of them."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path}: not a complete gzip file ({error})") from error
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{path}: not a Parquet file ({error})") from error
