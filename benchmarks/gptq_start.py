"""GPTQ (https://arxiv.org/abs/2210.17323) of one weight, from which GSQ starts."""

from __future__ import annotations

import torch
from torch import Tensor

from autoround_modifier.formats.integer import integer_range

__all__ = ["gptq", "signed_scales"]

# As in GSQ's source: errors count by this power, and scales shrink down to a fifth.
ERROR_POWER = 2.4
LARGEST_SHRINKAGE = 0.8


def gptq(
    weight: Tensor,
    hessian: Tensor,
    num_bits: int,
    group_size: int,
    damping: float = 0.1,
    candidates: int = 25,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Round one input channel after the other; each error is made up for by the channels that follow,
    in the order in which they lie in the weight. A group's scale is searched when its first channel
    is reached.

    :param weight: (out_features, in_features), any float dtype
    :param hessian: sum over tokens of the outer product of a layer's input, (in_features,
        in_features)
    :param group_size: input channels that share a scale, a divisor of in_features
    :param damping: added to the diagonal, as a share of its mean
    :param candidates: of `signed_scales`
    :param scales: given ones, (out_features, groups); None to search them
    :return: integers, (out_features, in_features), and scales, (out_features, groups), float32
    """
    columns = weight.shape[1]
    low, high = integer_range(num_bits)
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)

    # Channels are rows here, so that each is contiguous.
    remaining = weight.float().T.clone()
    remaining[dead] = 0
    integers = torch.empty_like(remaining)
    found = []
    for start in range(0, columns, group_size):
        end = start + group_size
        group = remaining[start:end].clone()
        scale = (
            signed_scales(group.T, num_bits, candidates)
            if scales is None
            else scales[:, start // group_size].float()
        )
        found.append(scale)
        errors = torch.empty_like(group)
        for index in range(group_size):
            to_next = factor[start + index, start + index : end]
            integer = (group[index] / scale).round_().clamp_(low, high)
            integers[start + index] = integer
            errors[index] = (group[index] - integer * scale) / to_next[0]
            group[index + 1 :].addr_(to_next[1:], errors[index], alpha=-1)
        remaining[end:] -= factor[start:end, end:].T @ errors
    return integers.T.contiguous(), torch.stack(found, dim=1)


def signed_scales(groups: Tensor, num_bits: int, candidates: int = 25) -> Tensor:
    """
    The best of evenly spaced scales of either sign, by the error of rounding to nearest. A negative
    scale makes the additional integer, ``-2^(b-1)``, positive.

    :param groups: (groups, group_size), float32
    :param candidates: spacing of the scales, as a fraction of the observed range; GSQ's source has
        100, of which four fifths are tried
    :return: (groups,), float32, not zero
    """
    low, high = integer_range(num_bits)
    reach = groups.abs().amax(1)
    reach = torch.where(reach == 0, torch.ones_like(reach), reach)
    best = torch.full_like(reach, torch.inf)
    scales = reach.clone()
    for index in range(round(LARGEST_SHRINKAGE * candidates)):
        magnitude = 2 * reach / (high - low) * (1 - index / candidates)
        for scale in (magnitude, -magnitude):
            rounded = (groups / scale[:, None]).round_().clamp_(low, high)
            difference = rounded.mul_(scale[:, None]).sub_(groups).abs_()
            error = difference.log2_().mul_(ERROR_POWER).exp2_().sum(1)  # a power, but faster
            better = error < best
            best = torch.where(better, error, best)
            scales = torch.where(better, scale, scales)
    return scales
