"""Names, shapes and dtypes of the tensors of a checkpoint, and its config, without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["CheckpointLayout", "TensorLayout"]


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
