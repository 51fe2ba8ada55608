"""The files of a checkpoint: ``config.json``, and which file holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from autoround_modifier.errors import CheckpointError

__all__ = [
    "CONFIG",
    "INDEX",
    "add_to_index",
    "read_json",
    "tensor_files",
    "write_json",
]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """
    :raises CheckpointError: if the file cannot be read, or holds no JSON object
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write in the layout that Transformers gives ``config.json``."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensor_files(folder: Path) -> dict[str, Path]:
    """
    :return: tensor name -> file: by the index of a sharded checkpoint, or of all safetensors
    :raises CheckpointError: if a file cannot be read
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map") or {}
        return {name: folder / file for name, file in weight_map.items()}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return files


def add_to_index(folder: Path, file: str, names: Iterable[str]) -> None:
    """
    Let the index name the tensors of one more file. A checkpoint in a single file gets an index.

    :param folder: of the checkpoint
    :param file: name of a safetensors file in it
    :param names: of the tensors in that file
    :raises CheckpointError: if a file cannot be read
    """
    known = {name: path.name for name, path in tensor_files(folder).items() if path.name != file}
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    weight_map = known | dict.fromkeys(names, file)
    size = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    metadata = {**index.get("metadata", {}), "total_size": size}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
