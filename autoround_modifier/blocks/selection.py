"""Which calibration samples are used, and in which order."""

from __future__ import annotations

import hashlib
from bisect import insort
from dataclasses import dataclass

from autoround_modifier.errors import CalibrationError
from autoround_modifier.parallel import gathered, process_rank

# Bytes of a key that say which sample it is; what follows decides between equal ones.
KEY_SIZE = 16

__all__ = ["KEY_SIZE", "SampleOrder", "SampleSelection"]


@dataclass(frozen=True)
class SampleOrder:
    """
    Which samples are used.

    :param indices: of those of this process, as they were recorded
    :param positions: of each among the samples of all processes, ascending
    :param digest: of all samples that were recorded, used or not
    """

    indices: list[int]
    positions: list[int]
    digest: bytes


class SampleSelection:
    """
    The samples with the smallest keys among those of all processes, in the order of their keys. A
    key is of a sample's content, so that the order in which the pipeline delivers samples does not
    count; `sample_key` makes it.

    :param limit: largest number of samples of all processes together; None for all
    :ivar order: the selection, once it is decided
    """

    def __init__(self, limit: int | None):
        self.limit = limit
        self.order: SampleOrder | None = None
        self._keys: list[bytes] = []
        # Until the order is decided, the samples of this process that can still be selected
        self._candidates: list[tuple[bytes, int]] = []
        self._indices: set[int] = set()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: bytes) -> int | None:
        """
        Add the next sample of this process.

        :return: the index of a sample that cannot be selected any more; None if there is none
        """
        index = len(self._keys)
        self._keys.append(key)
        insort(self._candidates, (key, index))
        self._indices.add(index)
        if self.limit is None or len(self._candidates) <= self.limit:
            return None
        _, dropped = self._candidates.pop()
        self._indices.remove(dropped)
        return dropped

    def may_select(self, index: int) -> bool:
        """:return: whether a sample is selected, or can still be"""
        return index in self._indices or (self.order is None and index >= len(self._keys))

    def decide(self) -> SampleOrder:
        """
        All processes call this together; no sample is added later.

        :raises CalibrationError: if all processes have the same samples
        """
        if self.order is not None:
            return self.order
        shares = gathered(self._keys)
        # The input of some module lists is a constant, the same in all samples.
        varied = len(shares) > 1 and len(set(self._keys)) > 1
        if varied and all(sorted(share) == sorted(self._keys) for share in shares):
            raise CalibrationError(
                "all processes were given the same calibration samples; give each its share, as by "
                "`llmcompressor.datasets.get_rank_partition`, or use `autoround_modifier.oneshot`"
            )
        everywhere = sorted(
            (key, rank, index)
            for rank, share in enumerate(shares)
            for index, key in enumerate(share)
        )
        rank, _ = process_rank()
        chosen = enumerate(everywhere[: self.limit])
        mine = [(position, index) for position, (_, owner, index) in chosen if owner == rank]
        contents = b"".join(key[:KEY_SIZE] for key, _, _ in everywhere)
        digest = hashlib.blake2b(contents, digest_size=KEY_SIZE)
        self.order = SampleOrder(
            [index for _, index in mine], [position for position, _ in mine], digest.digest()
        )
        self._indices = set(self.order.indices)
        self._candidates.clear()
        return self.order
