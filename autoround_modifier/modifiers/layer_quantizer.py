"""Writes quantized weights into their layers, and knows which layers are left."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from loguru import logger
from torch import Tensor, nn

from autoround_modifier.errors import CheckpointError
from autoround_modifier.formats import FormatSpec, QuantizedWeight, TunedWeight
from autoround_modifier.host.layers import (
    Layer,
    get_execution_device,
    stored_weight,
    write_parameter,
)
from autoround_modifier.host.schemes import QuantizationArgs
from autoround_modifier.host.write_back import write_back
from autoround_modifier.modifiers.gguf_blocks import TunedBlocks
from autoround_modifier.parallel import wait_for_all
from autoround_modifier.progress.events import LayerQuantized, is_anyone_listening, publish
from autoround_modifier.search.initial_weights import InitialWeights

__all__ = ["LayerQuantizer", "check_parts"]


class LayerQuantizer:
    """
    :param initial: where each layer starts
    :param args: how the weight of each layer is quantized
    :param blocks: takes the layers that are tuned in a type of GGUF
    :ivar unquantized: layers that are not quantized yet
    """

    def __init__(
        self,
        initial: InitialWeights,
        args: dict[Layer, QuantizationArgs],
        blocks: TunedBlocks | None = None,
    ) -> None:
        self.initial = initial
        self.blocks = blocks
        self.args = args
        self.names = initial.names
        self.unquantized = set(initial.names)

    def waiting(self, modules: Iterable[nn.Module]) -> list[Layer]:
        """:return: those of the modules that are layers not quantized yet, in model order"""
        chosen = self.unquantized.intersection(modules)
        return [layer for layer in self.names if layer in chosen]

    def restored(self, layer: Layer, parts: dict[str, Tensor]) -> QuantizedWeight:
        """
        :param parts: of a `QuantizedWeight` of this layer, on any device; from a file
        :return: the same weight, on the layer's device
        :raises CheckpointError: if they are not what this layer's format has
        """
        weight, spec = stored_weight(layer), self.initial.specs[layer]
        device = get_execution_device(layer)
        check_parts(f"{self.names[layer]}.weight", parts, _layout(weight, spec))
        return QuantizedWeight(
            {name: tensor.to(device) for name, tensor in parts.items()},
            spec.grid(weight.dtype),
            spec.grouping(tuple(weight.shape)),
        )

    def write_back(self, layer: Layer, weight: QuantizedWeight) -> None:
        """Set the layer's weight, scale and zero point, for good."""
        if is_anyone_listening():
            original = layer.weight.detach()
            error = (original - weight.dequantize()).float().square().sum()
            error /= original.float().square().sum()
            publish(LayerQuantized(self.names[layer], float(error)))
        moved = 0
        if self.blocks is not None and self.names[layer] in self.blocks.types:
            write_parameter(layer, "weight", weight.dequantize())
            self.blocks.add(self.names[layer], weight)
        else:
            moved = write_back(layer, weight, self.args[layer])
        if moved:
            logger.info(
                f"{self.names[layer]}: {moved} of {weight.values.numel()} integers moved by one "
                f"step, because {weight.grid.dtype} cannot carry them to the checkpoint"
            )
        self.unquantized.discard(layer)

    def quantize(self, modules: Iterable[nn.Module], search: bool) -> list[str]:
        """
        Quantize without tuning.

        :param modules: layers among them that are quantized already are skipped
        :param search: see `InitialWeights.start`
        :return: names of the layers that were quantized
        """
        layers = self.waiting(modules)
        for layer in layers:
            weight = self.initial.start(layer, search).quantized()
            wait_for_all()  # other processes may share the weight, and still read it
            self.write_back(layer, weight)
        return [self.names[layer] for layer in layers]


def _layout(weight: Tensor, spec: FormatSpec) -> dict[str, Tensor]:
    """:return: the parts of a weight of this shape and format, without data"""
    empty = torch.empty_like(weight, device="meta")
    global_scale = torch.empty(1, device="meta") if spec.global_scale else None
    return TunedWeight(empty, spec, global_scale=global_scale).quantized().parts


def check_parts(owner: str, parts: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """
    :param owner: what they are parts of, for messages
    :param parts: by name, from a file
    :param expected: tensors of the right shapes and dtypes
    :raises CheckpointError: if names, shapes or dtypes differ, or a number is NaN or infinite
    """
    if set(parts) != set(expected):
        found = ", ".join(sorted(parts)) or "nothing"
        raise CheckpointError(f"{owner}: has {found}, expected {', '.join(sorted(expected))}")
    for name, tensor in parts.items():
        like = expected[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise CheckpointError(
                f"{owner}:{name} is {tuple(tensor.shape)}, {tensor.dtype}; expected "
                f"{tuple(like.shape)}, {like.dtype}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise CheckpointError(f"{owner}:{name} has NaN or infinity")
