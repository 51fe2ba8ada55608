"""Where documents come from: files, folders, the Hugging Face Hub, datasets and lists in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset

from autoround_modifier.calibration.documents import TEXT_COLUMNS, either
from autoround_modifier.calibration.records import DATA_SUFFIXES, Record, file_kind, read_records
from autoround_modifier.errors import CalibrationError

__all__ = ["DataSource", "HubAccess", "described", "holds_text", "is_dataset", "may_be_on_hub"]

_PLAIN_TEXT = (".txt", ".md")
_DATASETS = (Dataset, DatasetDict, IterableDataset, IterableDatasetDict)
# Columns with which only the model's processor can make samples.
_MEDIA = {"image", "images", "audio", "audios", "video", "videos"}
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
# Further columns that LLM-Compressor hands to the model or to its processor.
_MODEL_INPUTS = ("_ids", "_values", "_features", "_embeds")


@dataclass(frozen=True)
class HubAccess:
    """
    :param token: for the Hugging Face Hub
    :param local_files_only: load nothing that is not on this machine
    """

    token: str | bool | None = None
    local_files_only: bool = False


@dataclass(frozen=True)
class DataSource:
    """
    One source of documents; the names are those of `datasets.load_dataset` and of LLM-Compressor.

    :param path: file, folder, or name of a dataset on the Hugging Face Hub; or a dataset, or a list
        of texts or rows
    :param num_samples: samples to take; None for as many as are asked for
    :param name: configuration of a dataset of the Hub or of a folder
    :param data_files: files of it
    :param split: split of it; None takes ``train``, or the only one
    :param revision: of a dataset of the Hub
    :param text_column: column of the text or the messages; None looks for a known one
    :param match: columns and the values without which a row does not count
    """

    path: Any
    num_samples: int | None = None
    name: str | None = None
    data_files: Any = None
    split: str | None = None
    revision: str | None = None
    text_column: str | None = None
    match: Mapping[str, Any] = field(default_factory=dict)

    def records(self, hub: HubAccess) -> Iterator[Record]:
        """
        :return: rows, or whole texts
        :raises CalibrationError: if there is nothing of that name, or it cannot be read
        """
        if isinstance(self.path, (str, os.PathLike)):
            path = Path(self.path).expanduser()
            if path.is_file():
                self._refuse_options(f"{path} is a file", ("name", "data_files", "revision"))
                if self.split is not None:
                    raise CalibrationError(
                        f"{path} is a file and has no split `{self.split}`; to choose rows by a "
                        f"column use `match: {{split: {self.split}}}`"
                    )
                return read_records(path)
            if path.is_dir():
                return self._folder(path)
            if not may_be_on_hub(str(self.path)):
                raise CalibrationError(f"calibration data: no file or folder `{self.path}`")
            return _rows(self._one_split(self._from_hub(hub)), str(self.path))
        if is_dataset(self.path):
            return _rows(self._one_split(self.path), "dataset")
        if isinstance(self.path, Iterable):
            return _rows(self.path, "dataset")
        raise CalibrationError(
            f"calibration data: {self.path!r} is no file, folder, dataset, list or mixture"
        )

    def _refuse_options(self, what: str, names: tuple[str, ...]) -> None:
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            raise CalibrationError(f"{what}, for which `{'`, `'.join(given)}` means nothing")

    def _folder(self, path: Path) -> Iterator[Record]:
        files = sorted(x for x in path.rglob("*") if x.is_file() and not x.name.startswith("."))
        if not files:
            raise CalibrationError(f"{path}: the folder is empty")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            self._refuse_options(f"{path} is a saved dataset", ("name", "data_files", "revision"))
            return _rows(self._one_split(datasets.load_from_disk(path)), str(path))
        if all(file_kind(x) in _PLAIN_TEXT for x in files) and self.data_files is None:
            # `datasets` would make a row of each line.
            return (record for file in files for record in read_records(file))
        return _rows(self._one_split(self._load(str(path), streaming=True)), str(path))

    def _from_hub(self, hub: HubAccess) -> Any:
        offline = hub.local_files_only or datasets.config.HF_HUB_OFFLINE
        try:
            # Streaming fetches no more than is read, and cannot read what was downloaded before.
            return self._load(
                str(self.path),
                streaming=not offline,
                token=hub.token,
                download_config=datasets.DownloadConfig(local_files_only=offline),
            )
        except CalibrationError as error:
            raise CalibrationError(
                f"{error}. It was looked for on the Hugging Face Hub"
                + (" as far as it is on this machine" if offline else "")
                + f", as there is no folder `{self.path}`. Without network, download it elsewhere "
                f"(`hf download --repo-type dataset {self.path} --local-dir FOLDER`) and give the "
                "folder as `path`."
            ) from error

    def _load(self, path: str, **arguments: Any) -> Any:
        try:
            return load_dataset(
                path,
                self.name,
                data_files=self.data_files,
                split=self.split,
                revision=self.revision,
                **arguments,
            )
        except Exception as error:  # of many kinds, by what is missing
            raise CalibrationError(
                f"dataset `{path}` cannot be loaded: {type(error).__name__}: {error}"
            ) from error

    def _one_split(self, data: Any) -> Iterable[Any]:
        if not isinstance(data, dict):
            return data
        splits = list(data)
        wanted = self.split or ("train" if len(splits) > 1 else splits[0])
        if wanted not in splits:
            raise CalibrationError(
                f"{described(self.path)}: no split `{wanted}`; it has {', '.join(splits)}. Name "
                "one with `split`."
            )
        return data[wanted]


def _rows(rows: Iterable[Any], name: str) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield Record(f"{name}: row {number}", row)


def may_be_on_hub(name: str) -> bool:
    """:return: whether it has the form of the name of a dataset on the Hugging Face Hub"""
    return bool(_HUB_NAME.fullmatch(name)) and file_kind(Path(name)) not in DATA_SUFFIXES


def is_dataset(data: object) -> bool:
    """:return: whether it is a dataset of the library `datasets`"""
    return isinstance(data, _DATASETS)


def described(path: Any) -> str:
    """:return: what `path` of a source is, for messages"""
    if isinstance(path, (str, os.PathLike)):
        return str(path)
    return "the dataset" if is_dataset(path) else "the list"


def holds_text(data: Any, text_column: str | None = None) -> bool:
    """
    Whether the rows of a dataset are to be tokenized here, rather than to be handed on.

    :param data: a dataset of the library `datasets`
    :raises CalibrationError: if it has neither text, nor token ids, nor anything else that a model
        or its processor takes; names the columns that are there
    """
    columns = data.column_names
    if isinstance(columns, dict):
        columns = sorted({column for names in columns.values() for column in names or ()})
    if columns is None:  # a stream whose rows nobody has seen yet
        return True
    if any(column in _MEDIA or column.endswith(_MODEL_INPUTS) for column in columns):
        return False
    wanted = TEXT_COLUMNS if not text_column else (text_column, *TEXT_COLUMNS)
    if any(column in columns for column in wanted):
        return True
    there = ", ".join(f"`{column}`" for column in columns) or "none"
    raise CalibrationError(
        f"the calibration dataset has no column {either(wanted)}, and no `input_ids`; it has "
        f"{there}. Name the column of the text or the messages with `text_column`."
    )
