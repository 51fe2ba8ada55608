"""How much each input channel of a layer is used: the importance of SignRoundV2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Importance"]


class Importance:
    """
    Sums ``x_j^2`` per input channel j of each layer over all calibration tokens: the importance
    h_j of SignRoundV2 (https://arxiv.org/abs/2512.04746).
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Module, Tensor] = {}
        self._num_tokens: dict[nn.Module, int] = {}

    @torch.no_grad()
    def record(self, layer: nn.Module, x: Tensor, token_mask: Tensor | None = None) -> None:
        """
        Add one batch of inputs, (..., in_features), floating-point; token ids are ignored.

        :param token_mask: (batch, tokens), bool, False for tokens that shall not count; without
            effect on layers that see tokens in another arrangement, such as routed experts
        """
        if not x.is_floating_point():
            return
        if token_mask is not None and x.shape[:-1] == token_mask.shape:
            x = x[token_mask]
        # float64, so that the order of the batches does not show in the result
        tokens = x.detach().flatten(0, -2)
        squares = tokens.float().square().sum(0).double()
        self._sums[layer] = self._sums[layer] + squares if layer in self._sums else squares
        self._num_tokens[layer] = self._num_tokens.get(layer, 0) + len(tokens)

    def copy(self) -> Importance:
        """:return: the same record; what is taken out of it stays in this one"""
        other = Importance()
        other._sums, other._num_tokens = dict(self._sums), dict(self._num_tokens)
        return other

    def pop(self, layer: nn.Module) -> Tensor | None:
        """:return: (in_features,), float64; None if the layer saw no tokens"""
        return self._sums.pop(layer, None)

    def num_tokens(self, layer: nn.Module) -> int:
        """How many tokens of the layer were counted, also after `pop`."""
        return self._num_tokens.get(layer, 0)
