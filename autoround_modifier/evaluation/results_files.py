"""Files of results of lm-evaluation-harness, as it writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoround_modifier.errors import EvaluationError

__all__ = ["read_results"]


def read_results(path: Path) -> dict[str, Any]:
    """
    :param path: file that lm-evaluation-harness wrote, or the folder that it was told to write to:
        ``results_<time>.json``, perhaps in a folder named after the model. Of several files, a task
        is taken from the newest that has it
    :return: ``results``, ``groups``, ``n-shot``, ...
    :raises EvaluationError: if there are no results, or those of several models
    """
    if path.is_file():
        return _read(path)
    files = sorted(path.rglob("results*.json"), key=lambda file: file.name)
    if not files:
        raise EvaluationError(f"{path}: there is no file of results of lm-evaluation-harness")
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        raise EvaluationError(
            f"{path} holds results of several models; name one of " + ", ".join(map(str, folders))
        )
    merged: dict[str, Any] = {}
    for file in files:
        for key, value in _read(file).items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merged[key] | value if both else value
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise EvaluationError(f"{path} is no file of results of lm-evaluation-harness")
    return content
