"""The block reconstruction loss."""

from __future__ import annotations

from torch import Tensor

__all__ = ["squared_error"]


def squared_error(output: Tensor, target: Tensor, token_mask: Tensor | None) -> Tensor:
    """
    Sum of squared differences over the tokens that count, in float32; divided by their number
    it is the loss of SignRound (https://arxiv.org/abs/2309.05516).

    :param output: (batch, tokens, hidden)
    :param target: same shape
    :param token_mask: (batch, tokens), bool, False for padding; None if every token counts
    :return: scalar, float32
    """
    error = output.float() - target.float()
    if token_mask is not None:
        # `where`, not a product: whatever stands in padding, even NaN, contributes nothing.
        error = error.where(token_mask.unsqueeze(-1), error.new_zeros(()))
    return error.square().sum()
