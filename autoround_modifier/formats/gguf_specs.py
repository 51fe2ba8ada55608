"""Specifications of the types of GGUF that weights are tuned in."""

from __future__ import annotations

import torch

from autoround_modifier.formats.spec import FormatSpec, WeightSpec
from autoround_modifier.formats.super_block import SUPER_BLOCK_SPECS
from autoround_modifier.gguf_schemes import GGUF_TYPES

__all__ = ["GGUF_SPECS"]

# By name, as `gguf_schemes.GGUF_TYPES`. Those without super-blocks are symmetric integers whose
# scale is float16, ``w = d * q``.
GGUF_SPECS: dict[str, FormatSpec] = {
    name: SUPER_BLOCK_SPECS.get(name)
    or WeightSpec("int", kind.num_bits, True, "group", kind.group_size, scale_dtype=torch.float16)
    for name, kind in GGUF_TYPES.items()
}
