"""
The blocks of a model that was tuned in types of GGUF, beside its dequantized weights.

They are in a folder of their own: engines load every safetensors file beside ``config.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoround_modifier.checkpoints.saved_files import opened
from autoround_modifier.errors import CheckpointError
from autoround_modifier.gguf_schemes import GGUF_TYPES
from autoround_modifier.host.saving import GGUF_BLOCKS

__all__ = ["BLOCKS_FILE", "SavedBlocks", "find_blocks_file", "write_gguf_blocks"]

BLOCKS_FILE = f"{GGUF_BLOCKS}/gguf_blocks.safetensors"
SCHEME, TYPES = "scheme", "types"


class SavedBlocks:
    """
    Only the header is read until blocks are asked for. From then on the file stays open: the header
    of a mixture has so many layers that reading it for each of them would take most of the time.

    :param folder: of a checkpoint that has them
    :ivar scheme: that the layers were tuned in, such as ``gguf:q4_k_m``
    :ivar types: layer, by its name in the checkpoint -> name of its type
    :raises CheckpointError: if the file cannot be read, or says of a layer no type that is known
    """

    def __init__(self, folder: Path):
        self.path = folder / BLOCKS_FILE
        self._file: Any = None
        with opened(self.path) as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
        try:
            self.scheme = str(metadata[SCHEME])
            self.types: dict[str, str] = dict(json.loads(metadata[TYPES]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} does not say in which types of GGUF its blocks are"
            ) from error
        unknown = set(self.types.values()) - set(GGUF_TYPES)
        if unknown or set(self.types) != names:
            raise CheckpointError(
                f"{self.path} has types or layers that are not known here: "
                f"{', '.join(sorted(unknown or names ^ set(self.types))[:4])}"
            )

    def blocks(self, layer: str) -> Tensor:
        """
        :return: (out_features, bytes of a row), uint8; rows in the order of the checkpoint
        :raises CheckpointError: if the file cannot be read
        """
        try:
            if self._file is None:
                self._file = safe_open(self.path, framework="pt")
            return cast(Tensor, self._file.get_tensor(layer))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error


def find_blocks_file(folder: Path) -> Path | None:
    """:return: the file, if the checkpoint has one"""
    path = folder / BLOCKS_FILE
    return path if path.is_file() else None


def write_gguf_blocks(
    folder: Path, scheme: str, types: Mapping[str, str], blocks: Mapping[str, Tensor]
) -> None:
    """
    :param folder: of a checkpoint that is not complete yet
    :param scheme: that the layers were tuned in
    :param types: layer -> name of its type
    :param blocks: layer -> (out_features, bytes of a row), uint8
    :raises OSError: if the file cannot be written
    """
    path = folder / BLOCKS_FILE
    path.parent.mkdir(exist_ok=True)
    metadata = {"format": "pt", SCHEME: scheme, TYPES: json.dumps(dict(types))}
    save_file(dict(blocks), path, metadata)
