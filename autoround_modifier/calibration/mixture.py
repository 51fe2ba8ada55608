"""Mixtures of sources: given in Python, or as a recipe of data, a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autoround_modifier.calibration.sources import DataSource, is_dataset
from autoround_modifier.calibration.tokens import Sample
from autoround_modifier.errors import CalibrationError

__all__ = ["data_recipes", "interleaved", "read_mixture", "shares"]

_PACKAGE = Path(__file__).parent.parent
# A wheel carries the recipes inside the package; in a checkout they are beside it.
_INSTALLED = _PACKAGE / "shipped_recipes"
_FOLDER = (_INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "recipes") / "data"
_YAML = (".yaml", ".yml")
_FIELDS = [field.name for field in dataclasses.fields(DataSource)]


def data_recipes() -> dict[str, Path]:
    """:return: name without ending -> path of every shipped recipe of data"""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def read_mixture(source: Any) -> list[DataSource] | None:
    """
    :param source: name of a shipped recipe of data, or path of one; a mapping of the fields of
        `DataSource`, or a list of such mappings
    :return: its sources; None if it is something else
    :raises CalibrationError: if a recipe of data, or a mapping, has wrong fields
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file() and str(source) in data_recipes():
            path = data_recipes()[str(source)]
        if path.suffix.lower() in _YAML and path.is_file():
            return _read_recipe(path)
        return None
    if isinstance(source, Mapping) and not is_dataset(source):
        entries = source["datasets"] if set(source) == {"datasets"} else [source]
        return _sources(entries, "dataset", [])
    if isinstance(source, (list, tuple)) and any(
        isinstance(entry, Mapping) and "path" in entry for entry in source
    ):
        return _sources(source, "dataset", [])
    return None


def _read_recipe(path: Path) -> list[DataSource]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, Mapping) or set(content) != {"datasets"}:
        raise CalibrationError(
            f"{path}: not a recipe of data, which is a list `datasets:` of mappings with `path` "
            "and `num_samples`"
        )
    assert isinstance(root, yaml.MappingNode)
    nodes = root.value[0][1].value
    lines = [node.start_mark.line + 1 for node in nodes] if isinstance(nodes, list) else []
    sources = _sources(content["datasets"], str(path), lines)
    return [
        dataclasses.replace(source, path=str(path.parent / source.path))
        if (path.parent / str(source.path)).exists()
        else source
        for source in sources
    ]


def _sources(entries: Any, place: str, lines: list[int]) -> list[DataSource]:
    """
    :param place: file, or name of the argument, for messages
    :param lines: of the entries in the file
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise CalibrationError(f"{place}: `datasets` is not a list of mappings with `path`")
    sources = []
    for index, entry in enumerate(entries):
        where = f"{place}:{lines[index]}" if lines else f"{place}[{index}]"
        if not isinstance(entry, Mapping):
            raise CalibrationError(f"{where}: {entry!r} is not a mapping with `path`")
        for name in entry:
            if name not in _FIELDS:
                near = difflib.get_close_matches(str(name), _FIELDS, n=1)
                hint = f"; did you mean `{near[0]}`?" if near else f"; use {', '.join(_FIELDS)}"
                raise CalibrationError(f"{where}: no field `{name}`{hint}")
        if entry.get("path") is None:
            raise CalibrationError(f"{where}: no `path`")
        count = entry.get("num_samples")
        if count is not None and (type(count) is not int or count < 1):
            raise CalibrationError(f"{where}: num_samples is {count!r}; use at least 1")
        if not isinstance(entry.get("match") or {}, Mapping):
            raise CalibrationError(f"{where}: `match` is not a mapping of columns to values")
        sources.append(DataSource(**{**entry, "match": entry.get("match") or {}}))
    if len({source.num_samples is None for source in sources}) > 1:
        raise CalibrationError(f"{place}: give `num_samples` to all datasets, or to none")
    return sources


def shares(sources: Sequence[DataSource], num_samples: int | None, default: int) -> list[int]:
    """
    :param num_samples: largest number of samples in all, or None
    :param default: in its place, for sources without a number of their own
    :return: how many samples each source gives: its ``num_samples``, all reduced in proportion if
        they are more than ``num_samples``; equal shares if the sources have no number
    """
    wanted = [1 if x.num_samples is None else x.num_samples for x in sources]
    if sources[0].num_samples is None:
        total = default if num_samples is None else num_samples
    else:
        total = min(sum(wanted), num_samples or sum(wanted))
    exact = [total * x / sum(wanted) for x in wanted]
    found = [int(x) for x in exact]
    by_fraction = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for index in by_fraction[: total - sum(found)]:
        found[index] += 1
    return found


def interleaved(parts: Sequence[Sequence[Sample]]) -> list[Sample]:
    """:return: the samples of all parts, such that the first of them hold each part's share"""
    order = sorted(
        ((position + 0.5) / len(part), index, position)
        for index, part in enumerate(parts)
        for position in range(len(part))
    )
    return [parts[index][position] for _, index, position in order]
