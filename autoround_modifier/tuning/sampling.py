"""Which calibration samples a block is tuned on, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["SampleShare", "minibatches", "split_holdout"]


@dataclass(frozen=True)
class SampleShare:
    """
    Which of the calibration samples this process holds, where several share them.

    :param num_tokens: of each sample of all processes, those that count
    :param held: the indices among them of the samples held here, ascending
    """

    num_tokens: list[int]
    held: list[int]

    @classmethod
    def everything(cls, num_tokens: list[int]) -> SampleShare:
        return cls(num_tokens, list(range(len(num_tokens))))

    def local(self, samples: list[int]) -> list[int]:
        """
        :param samples: indices among the samples of all processes
        :return: of those that are held here, the positions among the samples held here
        """
        position = {index: local for local, index in enumerate(self.held)}
        return [position[index] for index in samples if index in position]

    def tokens_of(self, samples: list[int]) -> int:
        """:return: number of tokens that count in these samples of all processes, at least 1"""
        return max(1, sum(self.num_tokens[index] for index in samples))


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
