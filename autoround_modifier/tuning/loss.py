"""
Block reconstruction losses. Each sums over the tokens of a batch, in float32; divided by the
number of tokens it is a mean per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LOSSES", "balanced_error", "filtered_error", "squared_error"]

FILTERED_SHARE = 1 / 1000
LEAST_ENERGY = 1e-6  # of the sample's mean; a token of zeros must not make all others invisible


def squared_error(output: Tensor, target: Tensor, token_mask: Tensor | None) -> Tensor:
    """
    Mean of the squared differences of each token: the loss of SignRound
    (https://arxiv.org/abs/2309.05516).

    :param output: (batch, tokens, hidden)
    :param target: same shape
    :param token_mask: (batch, tokens), bool, False for padding; None if every token counts
    :return: scalar, float32, the sum over tokens
    """
    return _difference(output, target, token_mask).square().mean(-1).sum()


def filtered_error(output: Tensor, target: Tensor, token_mask: Tensor | None) -> Tensor:
    """
    `squared_error` without the largest 0.1 % of the differences in the batch (SignRoundV2,
    https://arxiv.org/abs/2512.04746, section 3.3). Parameters as there.
    """
    squares = _difference(output, target, token_mask).square()
    num_dropped = max(1, int(squares.numel() * FILTERED_SHARE))
    threshold = squares.detach().flatten().topk(num_dropped, sorted=False).values.amin()
    return squares.where(squares < threshold, squares.new_zeros(())).mean(-1).sum()


def balanced_error(output: Tensor, target: Tensor, token_mask: Tensor | None) -> Tensor:
    """
    Squared length of the difference as a share of the target's, in the mean of two ways: of each
    token by itself, and of the sample as a whole. Parameters as in `squared_error`.

    In language models a few tokens, mostly the first, carry massive activations: 100 times the
    length of the others and 10,000 times their squared error (https://arxiv.org/abs/2402.17762).
    The share of the sample consists of them; all other tokens attend to them, so they must be
    right. The share of each token is what the next block sees after its normalisation; there the
    many ordinary tokens count. Either share alone lets the other kind of token go wrong.
    """
    energy = target.float().square().sum(-1)
    real = torch.ones_like(energy, dtype=torch.bool) if token_mask is None else token_mask
    energy = energy.where(real, energy.new_zeros(()))
    mean = energy.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
    mean = mean.clamp(min=torch.finfo(torch.float32).smallest_normal)
    of_token = 1 / torch.maximum(energy, mean * LEAST_ENERGY)
    of_sample = 1 / mean
    error = _difference(output, target, token_mask).square().sum(-1)
    return (error * (of_token + of_sample).where(real, energy.new_zeros(()))).sum() / 2


def _difference(output: Tensor, target: Tensor, token_mask: Tensor | None) -> Tensor:
    difference = output.float() - target.float()
    if token_mask is None:
        return difference
    # `where`, not a product: the values in padding, even NaN, contribute nothing.
    return difference.where(token_mask.unsqueeze(-1), difference.new_zeros(()))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "balanced": balanced_error,
    "mse": squared_error,
    "filtered": filtered_error,
}
