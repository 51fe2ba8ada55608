"""The files of a checkpoint: ``config.json``, and which file holds which tensor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from autoround_modifier.config_sections import check_config
from autoround_modifier.engines.layout import CheckpointLayout, TensorLayout
from autoround_modifier.errors import CheckpointError

__all__ = [
    "CONFIG",
    "INDEX",
    "add_to_index",
    "opened",
    "read_json",
    "read_layout",
    "tensor_files",
    "write_json",
]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# What safetensors calls the dtypes of PyTorch, in the headers of its files
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


def read_json(path: Path) -> dict[str, Any]:
    """
    :raises CheckpointError: if the file cannot be read, or holds no JSON object; of ``config.json``
        also if a section that is read is none
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if path.name == CONFIG:
        return check_config(found, path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """
    :param path: of a safetensors file, which is yielded open for reading
    :raises CheckpointError: if it cannot be read
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


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
        paths = {file: folder / file for file in set(weight_map.values())}
        return {name: paths[file] for name, file in weight_map.items()}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with opened(path) as file:
            files.update(dict.fromkeys(file.keys(), path))
    return files


def read_layout(folder: Path) -> CheckpointLayout:
    """
    :param folder: of a checkpoint in safetensors files
    :return: what their headers and ``config.json`` say; no weight is read
    :raises CheckpointError: if a file cannot be read, or is not there
    """
    config, files = read_json(folder / CONFIG), tensor_files(folder)
    tensors: dict[str, TensorLayout] = {}
    for path in sorted(set(files.values())):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype()) or file.get_tensor(name).dtype
                tensors[name] = TensorLayout(tuple(part.get_shape()), dtype)
    if not tensors:
        raise CheckpointError(f"{folder}: there are no safetensors files")
    if set(files) != set(tensors):
        different = min(set(files) ^ set(tensors))
        raise CheckpointError(
            f"{folder / INDEX}: the index and the files have different tensors, such as {different}"
        )
    return CheckpointLayout(config, tensors)


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
