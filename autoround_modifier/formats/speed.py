"""
How far V moves in a sign step, by the input channel of its weight.

The sign of a gradient gives a direction, but no distance. A Newton step is the gradient over the
second derivative. For a weight of a linear layer the latter is proportional to the mean square
``h_j`` of its input channel j (the importance of SignRoundV2, https://arxiv.org/abs/2512.04746),
the former typically to ``sqrt(h_j)``, so that the step falls with ``1 / sqrt(h_j)``. Between that
and equal steps lies ``h_j^-0.25``, which measured best (docs/benchmarks/ablation.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channel_speed"]

EXPONENT = 0.25
# Channels that are hardly used would get any speed.
MAX_RATIO = 8.0


def channel_speed(importance: Tensor) -> Tensor:
    """
    :param importance: (in_features,), h >= 0, in any unit
    :return: factor of the sign step of V, float32, same shape: ``(median(h) / h)^0.25``, the median
        being that of used channels, within [1/8, 8]; 1 if no channel was used
    """
    h = importance.double()
    used = h[h > 0]
    if not len(used):
        return torch.ones_like(h, dtype=torch.float32)
    return (used.median() / h).pow(EXPONENT).clamp(1 / MAX_RATIO, MAX_RATIO).float()
