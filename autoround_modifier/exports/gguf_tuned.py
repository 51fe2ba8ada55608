"""A checkpoint that was tuned in types of GGUF, as blocks of GGUF: those that it has already."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from autoround_modifier.checkpoints.contents import refuse_other_formats
from autoround_modifier.checkpoints.gguf_blocks import SavedBlocks, find_blocks_file
from autoround_modifier.checkpoints.saved_files import opened, read_layout, tensor_files
from autoround_modifier.engines.layout import CheckpointLayout
from autoround_modifier.errors import CheckpointError, ExportError
from autoround_modifier.exports.export_formats import AUTO, GGUF
from autoround_modifier.exports.gguf import GGUFSource
from autoround_modifier.exports.gguf_types import BLOCK_TYPES, Bytes
from autoround_modifier.exports.gguf_writing import PackedLayer
from autoround_modifier.gguf_schemes import K_QUANTS, gguf_scheme

__all__ = ["TunedCheckpoint"]

# `LlamaFileType` of gguf-py, of mixtures. Files of a single type have that of the smallest one
FILE_TYPES = {"gguf:q2_k_s": 21, "gguf:q3_k_m": 12, "gguf:q4_k_m": 15} | {
    f"{GGUF}{kind}": BLOCK_TYPES[kind].file_type for kind in K_QUANTS
}


class TunedCheckpoint:
    """
    :param folder: of the checkpoint
    :param format: that is asked for
    :ivar scheme: that it was tuned in
    :raises CheckpointError: if a file cannot be read, or the blocks are not those of the weights
    :raises ExportError: if it was not tuned in types of GGUF, or in others than are asked for
    """

    def __init__(self, folder: Path, format: str):
        refuse_other_formats(folder)
        if find_blocks_file(folder) is None:
            raise ExportError(
                f"{folder} was not tuned in `{format}`, and its scales would be rounded once more: "
                f"quantize the model with `scheme: {gguf_scheme(format)}`. `gguf:auto` exports "
                "integers to types that hold them as they are"
            )
        self.folder = folder
        self.saved = SavedBlocks(folder)
        self.scheme = self.saved.scheme
        if format.lower().replace("-", "_") not in (self.scheme, f"{GGUF}{AUTO}"):
            raise ExportError(
                f"{folder} was tuned in `{self.scheme}`, and cannot be exported to `{format}`: "
                f"export it to {self.scheme}"
            )
        self.layout: CheckpointLayout = read_layout(folder)
        missing = [x for x in self.saved.types if f"{x}.weight" not in self.layout.tensors]
        if missing:
            raise CheckpointError(f"{folder} has blocks of {missing[0]}, and no weight of it")
        self._files = tensor_files(folder)

    def source(self) -> GGUFSource:
        """:return: what is written"""
        return GGUFSource(
            self.folder,
            self.layout.config,
            {name: self._packed(name, kind) for name, kind in self.saved.types.items()},
            lambda empty: self.folder,
            FILE_TYPES[self.scheme],
        )

    def _packed(self, name: str, kind: str) -> PackedLayer:
        return PackedLayer(
            BLOCK_TYPES[kind], partial(self._blocks, name), partial(self._weight, name)
        )

    def _blocks(self, name: str) -> Bytes:
        return self.saved.blocks(name).numpy()

    def _weight(self, name: str) -> Tensor:
        with opened(self._files[f"{name}.weight"]) as file:
            return file.get_tensor(f"{name}.weight")
