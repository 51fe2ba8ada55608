"""One scale for a whole tensor, shared by layers that engines fuse (NVFP4)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from compressed_tensors.quantization.utils import generate_gparam
from llmcompressor.observers.helpers import FUSED_LAYER_NAMES
from torch import Tensor, nn

__all__ = ["shared_global_scales"]


@torch.no_grad()
def shared_global_scales(model: nn.Module, layers: Iterable[nn.Linear]) -> dict[nn.Module, Tensor]:
    """
    ``448 * 6 / max(abs(W))``, so that the scale of the group with the largest weight is E4M3's
    largest number. Engines multiply q, k and v by one fused weight, and gate and up likewise, so
    those share the largest weight of all of them.

    :param layers: those whose format has a global scale
    :return: (1,), float32, for each
    """
    largest: dict[nn.Module, Tensor] = {layer: layer.weight.abs().max().float() for layer in layers}
    for parent in model.modules():
        for names in FUSED_LAYER_NAMES:
            fused = [x for name in names if (x := getattr(parent, name, None)) in largest]
            if fused:
                shared = torch.stack([largest[layer] for layer in fused]).max()
                largest.update(dict.fromkeys(fused, shared))
    return {layer: generate_gparam(-value, value) for layer, value in largest.items()}
