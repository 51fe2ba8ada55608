"""What rounding costs at the output of each layer, before and after tuning. It changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoround_modifier.blocks.forwards import Forward
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.formats import QuantizedWeight, TunedWeight
from autoround_modifier.parallel import summed

__all__ = ["LayerError", "layer_errors"]


@dataclass(frozen=True)
class LayerError:
    """
    Squared errors of a layer's output, relative to its squared length, for the inputs that the
    layer has in the quantized block.

    :ivar initial: of the rounding that tuning started from; NaN if no token reached the layer
    :ivar final: of the rounding that was kept
    :ivar moved: values that differ between the two
    """

    initial: float
    final: float
    moved: int


@torch.no_grad()
def layer_errors(
    group: BlockGroup,
    formats: Mapping[nn.Linear, TunedWeight],
    weights: Mapping[nn.Linear, QuantizedWeight],
    fixed: Mapping[nn.Module, Forward],
    inputs: list[Tensor],
    samples: list[int],
) -> dict[nn.Linear, LayerError]:
    """
    :param group: the blocks, in full precision
    :param formats: of the tuned layers
    :param weights: of the same layers, that are kept
    :param fixed: what layers that were not tuned compute
    :param inputs: what the blocks will see: (1, tokens, hidden) per sample
    :param samples: which of them to run
    """
    # squared length, squared error at the start and now, for each layer
    sums = torch.zeros(len(formats), 3, device=group.device)
    untrained = {layer: fmt.untrained() for layer, fmt in formats.items()}
    moved = {}
    for layer, fmt in untrained.items():
        # bfloat16 holds the values of every format
        start, kept = (x.values.bfloat16() for x in (fmt.quantized(), weights[layer]))
        moved[layer] = int((start != kept).sum())

    def measured(layer: nn.Linear, row: Tensor) -> Forward:
        def forward(x: Tensor) -> Tensor:
            kept = weights[layer].dequantize()
            row.add_(
                torch.stack(
                    [
                        F.linear(x, weight).float().square().sum()
                        for weight in (
                            layer.weight,
                            layer.weight - untrained[layer].dequantize(),
                            layer.weight - kept,
                        )
                    ]
                )
            )
            return F.linear(x, kept, layer.bias)

        return forward

    forwards: dict[nn.Module, Forward] = {
        layer: measured(layer, row) for layer, row in zip(formats, sums, strict=True)
    }
    with group.quantized({**forwards, **fixed}):
        for indices, hidden in group.microbatches(inputs, samples):
            group.forward(hidden, indices)
    length, initial, final = summed(sums).unbind(1)
    errors = zip(formats, (initial / length).tolist(), (final / length).tolist(), strict=True)
    return {layer: LayerError(before, after, moved[layer]) for layer, before, after in errors}
