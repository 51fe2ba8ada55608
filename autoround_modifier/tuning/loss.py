"""
Block reconstruction losses. Each sums over the tokens of a batch, in float32; divided by the
number of tokens it is a mean per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LOSSES", "filtered_error", "relative_error", "squared_error"]

FILTERED_SHARE = 1 / 1000


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


def relative_error(output: Tensor, target: Tensor, token_mask: Tensor | None) -> Tensor:
    """
    Squared length of each token's difference as a share of the squared length of its target.

    What reads the residual stream of a language model normalises each token first, so this is the
    error that the next block sees. It also keeps the few tokens with massive activations, up to
    10,000 times longer than others, from being all that a plain mean consists of. Parameters as in
    `squared_error`.
    """
    energy = target.float().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    if token_mask is not None:
        energy = energy.where(token_mask, energy.new_ones(()))
    error = _difference(output, target, token_mask).square().sum(-1)
    return (error / energy).sum()


def _difference(output: Tensor, target: Tensor, token_mask: Tensor | None) -> Tensor:
    difference = output.float() - target.float()
    if token_mask is None:
        return difference
    # `where`, not a product: whatever stands in padding, even NaN, contributes nothing.
    return difference.where(token_mask.unsqueeze(-1), difference.new_zeros(()))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "mse": squared_error,
    "filtered": filtered_error,
    "relative": relative_error,
}
