"""Where the tuning of each layer starts: at a searched range, or at the observed one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from autoround_modifier.blocks.importance import Importance
from autoround_modifier.device import Compute
from autoround_modifier.errors import NonFiniteError
from autoround_modifier.formats import FormatSpec, TunedWeight
from autoround_modifier.host.layers import Layer, get_execution_device, stored_weight
from autoround_modifier.host.matching import fused_layers
from autoround_modifier.parallel import gathered, is_distributed, summed
from autoround_modifier.search.clipping_range import search_range
from autoround_modifier.search.shared_scale import shared_global_scale, shared_range

__all__ = ["InitialWeights"]


class InitialWeights:
    """
    :param names: the layers to quantize, in the order of the model, and their names for messages
    :param specs: what the weight of each is quantized to
    :param importance: of input channels, as far as it was recorded
    :param compute: runs search and tuning
    :param experts: the layers of routed experts
    :param min_expert_tokens: calibration tokens that must be routed to an expert; nothing is
        learned from fewer
    """

    def __init__(
        self,
        names: dict[Layer, str],
        specs: Mapping[Layer, FormatSpec],
        importance: Importance,
        compute: Compute | None = None,
        experts: Iterable[nn.Module] = (),
        min_expert_tokens: int = 0,
    ) -> None:
        self.names = names
        self.specs = specs
        self.importance = importance
        self.compute = compute or Compute()
        self.experts = frozenset(experts)
        self.min_expert_tokens = min_expert_tokens
        self._global_scales: dict[nn.Module, Tensor] = {}
        # of layers with one scale of the whole tensor: clipping range and importance
        self._shared: dict[nn.Module, tuple[tuple[Tensor, Tensor], Tensor | None]] = {}

    def find_shared_scales(self, model: nn.Module, layers: Iterable[Layer], search: bool) -> None:
        """
        Find the scales that layers share because engines fuse them. This uses up the importance of
        layers with one scale of the whole tensor.

        Called before the first of the layers is changed, but not earlier than needed: another
        modifier of the same pass may have changed the weights.

        :param layers: that are quantized next
        :param search: see `start`
        """
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        with_global_scale = [x for x in linear if self.specs[x].global_scale]
        with_one_scale = [x for x in linear if self.specs[x].strategy == "tensor"]
        for group in fused_layers(model, with_global_scale):
            scale = shared_global_scale([layer.weight for layer in group])
            self._global_scales.update(dict.fromkeys(group, scale))
        for group in fused_layers(model, with_one_scale):
            importance, *_ = [self._pop_importance(layer) for layer in group]
            weights = [layer.weight for layer in group]
            found = shared_range(weights, self.specs[group[0]], importance, search)
            self._shared.update(dict.fromkeys(group, (found, importance if search else None)))

    def start(self, layer: Layer, search: bool) -> TunedWeight:
        """
        :param search: start from the range with the least weighted error, not from the observed
            one, and let sign steps differ by channel
        :return: the weight of the layer at its initial range, not trainable yet
        :raises NonFiniteError: if the layer's inputs had NaN or infinity
        """
        spec, global_scale = self.specs[layer], self._global_scales.get(layer)
        found, importance = self._shared.pop(layer, (None, None))
        if found is None and search:
            importance = self._pop_importance(layer)
            found = search_range(layer.weight, spec, importance, global_scale, self.compute)
        return TunedWeight(layer.weight, spec, found, global_scale, importance, self.compute)

    def expert_tokens(self, layers: Iterable[Layer]) -> dict[Layer, int]:
        """:return: the layers of experts among these, and how many tokens each has seen"""
        counts = {
            layer: self.importance.num_tokens(layer) for layer in layers if layer in self.experts
        }
        if not counts:
            return {}
        totals = dict.fromkeys(counts, 0)
        for share in gathered(list(counts.values())):
            for layer, count in zip(counts, share, strict=True):
                totals[layer] += count
        return totals

    def forget(self, layer: Layer) -> None:
        """Drop what was recorded of a layer that is quantized in another way."""
        self.importance.pop(layer)
        self._shared.pop(layer, None)

    def _pop_importance(self, layer: Layer) -> Tensor | None:
        """:return: (in_features,), float32, over all processes; None where too little is known"""
        importance = self.importance.pop(layer)
        if is_distributed():
            if importance is None:
                importance = torch.zeros(
                    stored_weight(layer).shape[-1],
                    dtype=torch.float64,
                    device=get_execution_device(layer),
                )
            importance = summed(importance)
        if importance is not None and not torch.isfinite(importance).all():
            raise NonFiniteError(
                f"{self.names[layer]}: the calibration inputs have NaN or infinity. Check "
                "the calibration text, or load the model in bfloat16 or float32."
            )
        if self.expert_tokens([layer]).get(layer, self.min_expert_tokens) < self.min_expert_tokens:
            return None  # a handful of tokens says little about others
        return None if importance is None else importance.float()
