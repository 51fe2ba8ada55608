"""Names, shapes and dtypes of the tensors of a checkpoint, and its config, without the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from autoround_modifier.errors import CheckpointError

__all__ = ["CheckpointLayout", "TensorLayout", "read_layout"]

_INDEX = "model.safetensors.index.json"
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


@dataclass(frozen=True)
class TensorLayout:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class CheckpointLayout:
    """
    :param config: content of ``config.json``
    :param tensors: by their names in the files
    """

    config: dict[str, Any]
    tensors: Mapping[str, TensorLayout]

    @property
    def quantization(self) -> dict[str, Any]:
        """``quantization_config`` of the config; empty if there is none."""
        return self.config.get("quantization_config") or {}


def read_layout(folder: Path) -> CheckpointLayout:
    """
    :param folder: of a checkpoint in safetensors files
    :return: what their headers and ``config.json`` say; no weight is read
    :raises CheckpointError: if a file cannot be read, or is not there
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / _INDEX
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {folder / name for name in weight_map.values()}
        else:
            weight_map, files = None, set(folder.glob("*.safetensors"))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    tensors: dict[str, TensorLayout] = {}
    for path in sorted(files):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype()) or file.get_tensor(name).dtype
                    tensors[name] = TensorLayout(tuple(part.get_shape()), dtype)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not tensors:
        raise CheckpointError(f"{folder}: there are no safetensors files")
    if weight_map is not None and set(weight_map) != set(tensors):
        different = sorted(set(weight_map) ^ set(tensors))
        raise CheckpointError(
            f"{index}: the index and the files have different tensors, such as {different[0]}"
        )
    return CheckpointLayout(config, tensors)
