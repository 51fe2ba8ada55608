"""The checkpoint that a model was loaded from, read tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from autoround_modifier.checkpoints.saved_config import text_part
from autoround_modifier.checkpoints.saved_files import (
    CONFIG,
    INDEX,
    opened,
    read_json,
    tensor_files,
)
from autoround_modifier.errors import CheckpointError
from autoround_modifier.formats.fp8_blocks import dequantize_fp8_blocks

__all__ = ["SourceCheckpoint", "cached_config", "find_source"]

SCALE = "_scale_inv"


@dataclass(frozen=True)
class SourceCheckpoint:
    """
    :ivar config: its ``config.json``
    :ivar files: tensor name -> name of the file that holds it
    :ivar locate: the path of a file of that name, or None if it is not on this machine
    """

    config: dict[str, Any]
    files: dict[str, str]
    locate: Callable[[str], Path | None]

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """
        :param dtype: of a result that is stored in FP8, or is a matrix of float32; all others are
            as they are stored
        :raises CheckpointError: if it cannot be read
        """
        stored = self._stored(name)
        if stored.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            is_matrix = stored.ndim > 1 and stored.dtype == torch.float32
            return stored.to(dtype) if is_matrix else stored
        if f"{name}{SCALE}" not in self.files:
            raise CheckpointError(f"{name} is stored in {stored.dtype} without `{name}{SCALE}`")
        scale = self._stored(f"{name}{SCALE}")
        block = self._block()
        if block is None or scale.ndim < 2:
            return (stored.float() * scale.float()).to(dtype)
        return dequantize_fp8_blocks(stored, scale, block).to(dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """
        :raises CheckpointError: if its file cannot be read
        """
        with self._opened(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def is_scale(self, name: str) -> bool:
        """:return: whether a tensor only says how another one is stored"""
        return name.endswith(SCALE) and name.removesuffix(SCALE) in self.files

    def _block(self) -> tuple[int, int] | None:
        for part in (self.config, text_part(self.config)):
            block = (part.get("quantization_config") or {}).get("weight_block_size")
            if block:
                return block[0], block[1]
        return None

    def _stored(self, name: str) -> Tensor:
        with self._opened(name) as file:
            return file.get_tensor(name)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self.locate(self.files[name])
        if path is None:
            raise CheckpointError(f"{self.files[name]}, which holds {name}, is not on this machine")
        with opened(path) as file:
            yield file


def cached_config(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """
    :param name: folder of a checkpoint, or a name on the Hub. Nothing is downloaded
    :param revision: on the Hub
    :return: its ``config.json``; None if that is not on this machine
    """
    path = _locator(name, revision)(CONFIG)
    return None if path is None else read_json(path)


def find_source(name: str, revision: str | None = None) -> SourceCheckpoint | None:
    """
    :param name: folder of a checkpoint, or a name on the Hub. Nothing is downloaded
    :param revision: on the Hub
    :return: the checkpoint; None if it is not on this machine, or not in safetensors
    """
    locate = _locator(name, revision)
    config, index = locate(CONFIG), locate(INDEX)
    try:
        if config is None:
            return None
        if index is not None:
            files = read_json(index).get("weight_map") or {}
        else:
            weights = locate("model.safetensors")
            folder = Path(name) if weights is None else weights.parent
            files = {tensor: path.name for tensor, path in tensor_files(folder).items()}
        return SourceCheckpoint(read_json(config), files, locate) if files else None
    except CheckpointError:
        return None


def _locator(name: str, revision: str | None) -> Callable[[str], Path | None]:
    if name and Path(name).is_dir():

        def in_folder(file: str) -> Path | None:
            path = Path(name) / file
            return path if path.is_file() else None

        return in_folder

    def in_cache(file: str) -> Path | None:
        try:
            path = try_to_load_from_cache(name, file, revision=revision) if name else None
        except ValueError:  # it cannot be a name on the Hub
            return None
        return Path(path) if isinstance(path, str) else None

    return in_cache
