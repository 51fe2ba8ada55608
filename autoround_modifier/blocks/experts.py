"""
Which tokens each expert of a mixture is for.

By default LLM-Compressor shows every token to every expert during calibration. Of those, only the
tokens that the router sent to an expert describe its use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoround_modifier.host.experts import LinearExperts2D, all_experts_see_all_tokens

__all__ = ["ExpertRouting"]


class ExpertRouting:
    """
    `enter` must be called at each call of a mixture, before `select` is called for the layers of
    its experts.

    :param model: its experts have been split into linear layers (`linearize_moe`)
    :ivar mixtures: the modules that hold the experts of one block
    :ivar layers: the linear layers of all experts
    """

    def __init__(self, model: nn.Module):
        self.mixtures = [x for x in model.modules() if isinstance(x, LinearExperts2D)]
        self.layers: dict[nn.Linear, tuple[LinearExperts2D, int]] = {
            layer: (mixture, index)
            for mixture in self.mixtures
            for index in range(mixture.num_experts)
            for layer in mixture[index].modules()
            if isinstance(layer, nn.Linear)
        }
        self._all_shown: dict[nn.Module, bool] = {}
        self._rows: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def enter(
        self, mixture: LinearExperts2D, args: tuple[Any, ...], token_mask: Tensor | None
    ) -> None:
        """
        Note how tokens are routed; called with the arguments of each call of a mixture.

        :param args: hidden states (tokens, hidden) and the chosen experts (tokens, k); or, as in
            Llama 4, (experts * tokens, hidden), zero for a token that is not the expert's
        :param token_mask: (batch, tokens), bool, False for tokens that shall not count
        """
        hidden = args[0]
        counts = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        if len(args) > 1:
            if token_mask is not None and token_mask.numel() == len(hidden):
                counts = token_mask.flatten().to(hidden.device)
            # the order in which the experts receive their tokens
            chosen = [torch.where((args[1] == index).T)[1] for index in range(mixture.num_experts)]
            rows = [(tokens, counts[tokens]) for tokens in chosen]
        else:
            counts = hidden.any(-1)
            if token_mask is not None and token_mask.numel() * mixture.num_experts == len(hidden):
                counts &= token_mask.flatten().to(hidden.device).repeat(mixture.num_experts)
            parts = torch.arange(len(hidden), device=hidden.device).chunk(mixture.num_experts)
            rows = [(tokens, counts[tokens]) for tokens in parts]
        self._all_shown[mixture] = all_experts_see_all_tokens()
        self._rows[mixture] = rows

    def select(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """
        :param layer: of an expert
        :param x: its input, (tokens, in_features): of all tokens, if all experts saw all tokens in
            the call that `enter` noted, else of those routed to it, in the order of the mixture
        :return: the rows that were routed to it and count
        """
        mixture, index = self.layers[layer]
        tokens, counts = self._rows[mixture][index]
        return x[tokens[counts]] if self._all_shown[mixture] else x[counts]
