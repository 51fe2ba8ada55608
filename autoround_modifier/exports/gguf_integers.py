"""A checkpoint of integers as blocks of GGUF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autoround_modifier.checkpoints.saved_files import CONFIG, write_json
from autoround_modifier.exports.gguf import GGUFSource
from autoround_modifier.exports.gguf_blocks import pack_integers
from autoround_modifier.exports.gguf_template import dtype_of_config
from autoround_modifier.exports.gguf_types import BlockType, Bytes
from autoround_modifier.exports.gguf_writing import PackedLayer
from autoround_modifier.exports.integer_layers import IntegerCheckpoint, IntegerLayer
from autoround_modifier.exports.written_files import copy_others, write_weights

__all__ = ["integer_source"]


def integer_source(checkpoint: IntegerCheckpoint, kinds: Mapping[str, BlockType]) -> GGUFSource:
    """
    :param kinds: name of a layer -> type that holds it
    """
    dtype = dtype_of_config(checkpoint.config)

    def blocks(name: str) -> Bytes:
        return pack_integers(checkpoint.layer(name), kinds[name])

    def weight(name: str) -> Tensor:
        return _dequantize(checkpoint.layer(name), dtype)

    return GGUFSource(
        checkpoint.folder,
        checkpoint.config,
        {
            name: PackedLayer(kind, partial(blocks, name), partial(weight, name))
            for name, kind in kinds.items()
        },
        partial(_write_dense, checkpoint, dtype),
        Counter(kinds.values()).most_common(1)[0][0].file_type,
    )


def _write_dense(checkpoint: IntegerCheckpoint, dtype: torch.dtype, folder: Path) -> Path:
    write_weights(checkpoint, lambda layer: {"weight": _dequantize(layer, dtype)}, folder)
    copy_others(checkpoint.folder, folder)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    write_json(folder / CONFIG, config)
    return folder


def _dequantize(layer: IntegerLayer, dtype: torch.dtype) -> Tensor:
    """:return: (out_features, in_features)"""
    scale, zero_point = (
        x.float().repeat_interleave(layer.spec.features_per_scale, 1)
        for x in (layer.scale, layer.zero_point)
    )
    return (scale * (layer.codes.float() - zero_point)).to(dtype)
