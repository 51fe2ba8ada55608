"""
What a group of blocks saw and gave, so that a saved group is known to be of the same run.

Two machines, or two versions of PyTorch, give activations that differ in their last bits. Digests
tell whether activations are the same bit by bit. Means and root mean squares of each sample tell
whether they are the same but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoround_modifier.blocks.samples import content_key
from autoround_modifier.parallel import gathered
from autoround_modifier.runs.digests import text_digest

__all__ = ["COLUMNS", "POOLED_TOLERANCE", "SAMPLE_TOLERANCE", "BlockData", "describe_data"]

# Largest relative difference that is taken for rounding. Blocks of other data differ by more in
# some sample, and a hidden state in bfloat16 has a relative precision of 2^-8.
SAMPLE_TOLERANCE = 1e-2
# The same between means over all samples, where it is not known which sample is which.
POOLED_TOLERANCE = 1e-1

# tokens; mean and root mean square of the input; the same of the output
COLUMNS = 5


@dataclass(frozen=True)
class BlockData:
    """
    Of the samples of all processes, but for ``own_digest``.

    :param digest: of inputs, outputs and masks, bit by bit, whatever the order of the samples
    :param own_digest: of those of this process, in their order
    :param order: digest of what decides which samples are used, and in which order
    :param samples: of each sample, in order: number of tokens that count; mean and root mean
        square of the full-precision input; the same of the output
    """

    digest: str
    own_digest: str
    order: str
    samples: list[list[float]]

    def facts(self) -> dict[str, Any]:
        """:return: what `difference` needs to know later, as JSON values"""
        return {"order": self.order, "samples": self.samples}

    def difference(self, facts: dict[str, Any]) -> float | None:
        """
        Where the first inputs of the model have the same bits (token embeddings do), samples are
        compared one by one. Elsewhere their order depends on the last bits, and where not all are
        used, their choice as well: then means over all samples are compared.

        :param facts: `facts` of an earlier run
        :return: the largest relative difference, if it is within the tolerance; None if these are
            other data, or another model
        :raises KeyError: if one is missing
        """
        earlier, here = facts["samples"], self.samples
        if len(earlier) != len(here):
            return None
        tolerance = SAMPLE_TOLERANCE
        if facts["order"] == self.order:
            if any(one[0] != other[0] for one, other in zip(earlier, here, strict=True)):
                return None
        else:
            earlier, here, tolerance = [_pooled(earlier)], [_pooled(here)], POOLED_TOLERANCE
        rows = zip(earlier, here, strict=True)
        largest = max((_row_difference(one, other) for one, other in rows), default=0.0)
        return largest if largest <= tolerance else None  # None for NaN

    def explained(self, facts: dict[str, Any]) -> str:
        """
        :param facts: of an earlier run for which `difference` is None
        :return: how it differs, for messages
        """
        earlier, here = facts["samples"], self.samples
        if len(earlier) != len(here):
            return f"{len(earlier)} samples there, {len(here)} here"
        if facts["order"] != self.order:
            tokens = [sum(int(row[0]) for row in rows) for rows in (earlier, here)]
            count = (
                "" if tokens[0] == tokens[1] else f", {tokens[0]} tokens there, {tokens[1]} here"
            )
            return f"the samples are others{count}"
        pairs = list(zip(earlier, here, strict=True))
        if any(one[0] != other[0] for one, other in pairs):
            return "other tokens count (attention masks or loss masks)"
        largest = max(_row_difference(one, other) for one, other in pairs)
        return (
            f"the same samples give means that differ by {largest:.0%}, as with another dtype, "
            "attention implementation or version of the model's code"
        )


def describe_data(
    order: bytes,
    positions: list[int],
    inputs: list[Tensor],
    outputs: list[Tensor],
    masks: list[Tensor | None],
) -> BlockData:
    """
    :param order: digest of all samples that were recorded, used or not
    :param positions: of the samples of this process among those of all
    :param inputs: (1, tokens, hidden) per sample, in full precision
    :param outputs: same shapes
    :param masks: (1, tokens) bool per sample, None where every token counts
    """
    keys, rows = [], {}
    for position, x, y, mask in zip(positions, inputs, outputs, masks, strict=True):
        keys.append((content_key(x, mask) + content_key(y, mask)).hex())
        num_tokens = x.shape[1] if mask is None else int(mask.sum())
        rows[position] = [num_tokens, *_mean_and_rms(x, mask), *_mean_and_rms(y, mask)]
    everywhere = sorted(key for share in gathered(keys) for key in share)
    all_rows = {position: row for share in gathered(rows) for position, row in share.items()}
    return BlockData(
        text_digest([order.hex(), everywhere]),
        text_digest(keys),
        order.hex(),
        [all_rows[position] for position in sorted(all_rows)],
    )


def _mean_and_rms(hidden: Tensor, mask: Tensor | None) -> tuple[float, float]:
    """Of the tokens that count; in float32, which every device has."""
    real = (hidden if mask is None else hidden[mask]).detach().float()
    if real.numel() == 0:
        return 0.0, 0.0
    return float(real.mean()), float(torch.linalg.vector_norm(real)) / math.sqrt(real.numel())


def _pooled(rows: Iterable[list[float]]) -> list[float]:
    """:return: tokens, means, and root mean squares, each over all samples"""
    tokens, mean_in, rms_in, mean_out, rms_out = zip(*rows, strict=True)
    return [
        _mean(tokens),
        _mean(mean_in),
        math.sqrt(_mean([x * x for x in rms_in])),
        _mean(mean_out),
        math.sqrt(_mean([x * x for x in rms_out])),
    ]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _row_difference(one: list[float], other: list[float]) -> float:
    """:return: the largest difference of a mean or a root mean square, over the latter"""
    differences = []
    for first in (1, 3):
        (mean, rms), (other_mean, other_rms) = one[first : first + 2], other[first : first + 2]
        scale = max(rms, other_rms)
        if scale == 0:
            continue  # zeros on both sides, whose mean is zero
        differences += [abs(mean - other_mean) / scale, abs(rms - other_rms) / scale]
    return max(differences, default=0.0)
