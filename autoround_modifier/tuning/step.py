"""One sign-gradient step: which weights the samples are run with, and where gradients go."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from autoround_modifier.blocks.forwards import (
    Forward,
    with_weight,
    with_weight_trained_on_demand,
)
from autoround_modifier.formats import TunedWeight
from autoround_modifier.parallel import is_distributed, summed
from autoround_modifier.tuning.optimizer import SignSGD

__all__ = ["Step"]


class Step:
    """
    A layer that sees every token is quantized once, and samples accumulate gradients into its
    weight. The weight and the gradient of an expert exist only while they are needed: where the
    samples go through the blocks in one pass, V takes its step in the middle of the backward pass.

    :param formats: the weights being tuned
    :param optimizer: of these
    :param experts: layers that see few of the tokens
    :param one_pass: whether there will be one backward pass
    :ivar forwards: what the layers compute meanwhile
    :ivar finite: scalar bool on the device, whether no gradient had NaN or infinity so far; None
        before the first one
    """

    def __init__(
        self,
        formats: Mapping[nn.Linear, TunedWeight],
        optimizer: SignSGD,
        experts: Container[nn.Module],
        one_pass: bool,
    ):
        self.formats = formats
        self.optimizer = optimizer
        self.finite: Tensor | None = None
        self.forwards: dict[nn.Module, Forward] = {}
        self._leaves: dict[nn.Linear, Tensor] = {}
        self._gradients: dict[nn.Linear, Tensor] = {}
        at_once = one_pass and not is_distributed()
        for layer, fmt in formats.items():
            if layer in experts:
                on_gradient = partial(self._descend if at_once else self._accumulate, layer)
                self.forwards[layer] = with_weight_trained_on_demand(
                    fmt.dequantize, layer.bias, on_gradient
                )
            else:
                self._leaves[layer] = fmt.dequantize().requires_grad_()
                self.forwards[layer] = with_weight(self._leaves[layer], layer.bias)

    def end(self) -> None:
        """Take the step for all weights that did not take it during the backward pass."""
        for layer, fmt in self.formats.items():
            leaf = self._leaves.pop(layer, None)
            gradient = self._gradients.pop(layer, None) if leaf is None else leaf.grad
            if is_distributed():
                if gradient is None:  # another process may have had tokens for it
                    gradient = fmt.dequantize().zero_()
                gradient = summed(gradient)
            if gradient is not None:
                self._descend(layer, gradient)
        self.optimizer.end_step()

    def _accumulate(self, layer: nn.Linear, gradient: Tensor) -> None:
        earlier = self._gradients.get(layer)
        self._gradients[layer] = gradient if earlier is None else earlier.add_(gradient)

    def _descend(self, layer: nn.Linear, gradient: Tensor) -> None:
        # The sum is finite if all terms are, at a fraction of the time that looking at each takes.
        finite = gradient.sum(dtype=torch.float32).isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        self.optimizer.descend(layer, gradient)
