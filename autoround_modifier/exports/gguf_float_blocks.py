"""Blocks of GGUF that hold numbers of E2M1 (OCP Microscaling Formats v1.0, section 5.3.3)."""

from __future__ import annotations

import numpy as np

from autoround_modifier.exports.float_layers import FloatLayer
from autoround_modifier.exports.gguf_blocks import nibbles
from autoround_modifier.exports.gguf_types import Bytes

__all__ = ["pack_floats"]


def pack_floats(layer: FloatLayer) -> Bytes:
    """
    :return: (out_features, in_features / block * size). A block of MXFP4 is the scale of 32 numbers
        in E8M0, and the numbers; one of NVFP4 four scales in E4M3, each of 16 numbers, and the
        numbers. Elements j and j + n / 2 of n with one scale are in byte j
    """
    spec, codes, scale = layer.spec, layer.codes.numpy(), layer.scale.numpy()
    if spec.numbers == "mxfp4":
        packed = nibbles(codes.reshape(-1, 32))
        parts = [scale.reshape(-1, 1), packed]
    else:
        packed = nibbles(codes.reshape(-1, 16)).reshape(-1, 32)
        parts = [scale.reshape(-1, 4), packed]
    return np.concatenate(parts, axis=1).reshape(spec.out_features, -1)
