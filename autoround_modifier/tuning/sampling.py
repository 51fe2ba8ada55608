"""Which calibration samples a block is tuned on, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["minibatches", "split_holdout"]


def split_holdout(num_samples: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """
    Set a fixed slice of the samples aside. Candidates are compared on it and never tuned on it.

    :param fraction: share of the samples to hold out; at least one sample, and at most half
    :return: indices to tune on and indices held out; the same full list twice if there is only
        one sample or ``fraction`` is 0
    """
    samples = list(range(num_samples))
    held_out = min(max(1, round(num_samples * fraction)), num_samples // 2)
    if fraction == 0 or held_out == 0:
        return samples, samples
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def minibatches(samples: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """
    Yield batches without end, passing over all samples in a new random order each time.

    :param samples: indices to draw from, not empty
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(samples))
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            order = torch.randperm(len(samples), generator=generator).tolist()
            queue += [samples[i] for i in order]
        yield queue[:batch_size]
        queue = queue[batch_size:]
