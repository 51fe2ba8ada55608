"""Quantizes the targeted layers: where each starts, and what is written into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from compressed_tensors.offload import disable_onloading, get_execution_device
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from loguru import logger
from torch import Tensor, nn

from autoround_modifier.calibration.capture import ImportanceCapture
from autoround_modifier.distributed import gathered, is_distributed, summed, wait_for_all
from autoround_modifier.errors import NonFiniteError
from autoround_modifier.export import write_back
from autoround_modifier.formats import (
    Grouping,
    QuantizedWeight,
    RoundingFormat,
    has_global_scale,
    make_format,
)
from autoround_modifier.initialization import (
    fused_layers,
    search_range,
    shared_global_scale,
    shared_range,
)
from autoround_modifier.validation import Layer

__all__ = ["LayerQuantizer"]


class LayerQuantizer:
    """
    :param names: the layers to quantize, in the order of the model, and their names for messages
    :param args: how the weight of each is quantized
    :param fused: compute with `torch.compile`
    :param experts: the layers of routed experts
    :param min_expert_tokens: of calibration tokens routed to an expert; of fewer nothing is learned
    :ivar importance: of the input channels of layers, as far as they were recorded
    :ivar pending: layers that are not quantized yet
    """

    def __init__(
        self,
        names: dict[Layer, str],
        args: dict[Layer, QuantizationArgs],
        fused: bool,
        experts: Iterable[nn.Module] = (),
        min_expert_tokens: int = 0,
    ) -> None:
        self.names = names
        self.args = args
        self.fused = fused
        self.experts = frozenset(experts)
        self.min_expert_tokens = min_expert_tokens
        self.importance = ImportanceCapture()
        self.pending = set(names)
        self._global_scales: dict[nn.Module, Tensor] = {}
        # of layers with one scale of the whole tensor: clipping range and importance
        self._shared: dict[nn.Module, tuple[tuple[Tensor, Tensor], Tensor | None]] = {}

    def find_shared_scales(
        self, model: nn.Module, modules: Iterable[nn.Module], search: bool
    ) -> None:
        """
        Find what layers that engines fuse have in common, before the first of them is changed, but
        not earlier than needed: another modifier of the same pass may have changed the weights.

        :param modules: whose turn it is; those that are not pending do not count
        :param search: see `initial_format`
        """
        turn = self.pending.intersection(modules)

        def fused(condition: Callable[[QuantizationArgs], bool]) -> list[list[nn.Linear]]:
            chosen = [
                layer
                for layer in self.names
                if layer in turn and isinstance(layer, nn.Linear) and condition(self.args[layer])
            ]
            return fused_layers(model, chosen)

        for group in fused(has_global_scale):
            self._global_scales.update(dict.fromkeys(group, shared_global_scale(group)))
        for group in fused(lambda args: args.strategy == QuantizationStrategy.TENSOR):
            importance, *_ = [self._pop_importance(layer) for layer in group]
            found = shared_range(group, self.args[group[0]], importance, search)
            self._shared.update(dict.fromkeys(group, (found, importance if search else None)))

    def initial_format(self, layer: Layer, search: bool) -> RoundingFormat:
        """
        :param search: start from the range with the least weighted error, not from the observed
            one, and let sign steps differ by channel
        :raises NonFiniteError: if the layer's inputs had NaN or infinity
        """
        args, global_scale = self.args[layer], self._global_scales.get(layer)
        found, importance = self._shared.pop(layer, (None, None))
        if found is None and search:
            importance = self._pop_importance(layer)
            found = search_range(layer.weight, args, importance, global_scale, self.fused)
        return make_format(layer.weight, args, found, global_scale, importance, self.fused)

    def scarce_experts(self, layers: Iterable[Layer]) -> dict[Layer, int]:
        """:return: the layers of experts that saw too few tokens to learn from, and how many"""
        counts = {
            layer: self.importance.num_tokens(layer) for layer in layers if layer in self.experts
        }
        if not counts:
            return {}
        totals = dict.fromkeys(counts, 0)
        for share in gathered(list(counts.values())):
            for layer, count in zip(counts, share, strict=True):
                totals[layer] += count
        return {layer: n for layer, n in totals.items() if n < self.min_expert_tokens}

    def forget(self, layer: Layer) -> None:
        """Drop what was recorded of a layer that is quantized otherwise."""
        self.importance.pop(layer)
        self._shared.pop(layer, None)

    def restored_weight(self, layer: Layer, tensors: dict[str, Tensor]) -> QuantizedWeight:
        """
        :param tensors: what `QuantizedWeight.tensors` gave, on any device
        :return: the same weight, on the layer's device
        """
        with disable_onloading():
            shape = layer.weight.shape
        device = get_execution_device(layer)
        return QuantizedWeight(
            **{name: tensor.to(device) for name, tensor in tensors.items()},
            grouping=Grouping.of(shape, self.args[layer]),
        )

    def write_back(self, layer: Layer, weight: QuantizedWeight) -> None:
        """Set the layer's weight, scale and zero point, for good."""
        moved = write_back(layer, weight, self.args[layer])
        if moved:
            logger.info(
                f"{self.names[layer]}: {moved} of {weight.values.numel()} integers moved by one "
                f"step, because {weight.scale.dtype} cannot carry them to the checkpoint"
            )
        self.pending.discard(layer)

    def quantize_pending(self, modules: Iterable[nn.Module], search: bool) -> list[str]:
        """
        Quantize without tuning.

        :param modules: whose turn it is; those that are not pending do not count
        :param search: see `initial_format`
        :return: names of the layers that were quantized
        """
        turn = self.pending.intersection(modules)
        layers = [layer for layer in self.names if layer in turn]
        for layer in layers:
            weight = self.initial_format(layer, search).quantized()
            wait_for_all()  # other processes may share the weight, and still read it
            self.write_back(layer, weight)
        return [self.names[layer] for layer in layers]

    def _pop_importance(self, layer: Layer) -> Tensor | None:
        """:return: (in_features,), float32, over all processes; None where too little is known"""
        importance = self.importance.pop(layer)
        if is_distributed():
            with disable_onloading():
                size = layer.weight.shape[-1]
            if importance is None:
                importance = torch.zeros(
                    size, dtype=torch.float64, device=get_execution_device(layer)
                )
            importance = summed(importance)
        if importance is not None and not torch.isfinite(importance).all():
            raise NonFiniteError(
                f"{self.names[layer]}: the calibration inputs have NaN or infinity. Check "
                "the calibration text, or load the model in bfloat16 or float32."
            )
        if layer in self.scarce_experts([layer]):
            return None  # a handful of tokens says little about others
        return None if importance is None else importance.float()
