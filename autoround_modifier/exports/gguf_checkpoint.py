"""A compressed-tensors checkpoint as blocks of GGUF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from autoround_modifier.checkpoints.saved_files import CONFIG, write_json
from autoround_modifier.exports.float_layers import WeightCheckpoint
from autoround_modifier.exports.gguf import GGUFSource
from autoround_modifier.exports.gguf_blocks import pack_integers
from autoround_modifier.exports.gguf_float_blocks import pack_floats
from autoround_modifier.exports.gguf_template import dtype_of_config
from autoround_modifier.exports.gguf_types import BlockType, Bytes
from autoround_modifier.exports.gguf_writing import PackedLayer
from autoround_modifier.exports.written_files import copy_others, write_weights

__all__ = ["checkpoint_source"]


def checkpoint_source(checkpoint: WeightCheckpoint, kinds: Mapping[str, BlockType]) -> GGUFSource:
    """
    :param kinds: name of a layer -> type that holds it
    """
    dtype = dtype_of_config(checkpoint.config)
    return GGUFSource(
        checkpoint.folder,
        checkpoint.config,
        {name: _packed(checkpoint, name, kind, dtype) for name, kind in kinds.items()},
        partial(_write_dense, checkpoint, dtype),
        Counter(kinds.values()).most_common(1)[0][0].file_type,
    )


def _packed(
    checkpoint: WeightCheckpoint, name: str, kind: BlockType, dtype: torch.dtype
) -> PackedLayer:
    spec = checkpoint.float_specs.get(name)

    def blocks() -> Bytes:
        if spec is not None:
            return pack_floats(checkpoint.float_layer(name))
        return pack_integers(checkpoint.layer(name), kind)

    scale = None
    if spec is not None and spec.numbers == "nvfp4":
        scale = 1 / checkpoint.global_scale(name)
    return PackedLayer(kind, blocks, partial(checkpoint.weight, name, dtype), scale)


def _write_dense(checkpoint: WeightCheckpoint, dtype: torch.dtype, folder: Path) -> Path:
    write_weights(checkpoint, lambda name: {"weight": checkpoint.weight(name, dtype)}, folder)
    copy_others(checkpoint.folder, folder)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    write_json(folder / CONFIG, config)
    return folder
