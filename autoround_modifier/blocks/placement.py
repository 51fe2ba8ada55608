"""Where captured samples are kept: on the accelerator while they fit there, else on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from loguru import logger
from torch import nn

from autoround_modifier.device import free_memory
from autoround_modifier.host.layers import stored_parameters

__all__ = ["CHAINED", "HOST", "RECORDED", "RESERVE", "SamplePlacement"]

HOST = torch.device("cpu")
# Hidden states of each sample: what a block takes and gives, which is recorded, and what it takes
# once the blocks before it are quantized.
RECORDED, CHAINED = 2, 1
# Share of the free memory that is left to what was not foreseen.
RESERVE = 0.1


class SamplePlacement:
    """
    Decides for each block where its samples are kept. How large they are, and what recording and
    tuning take beside them, is known from the blocks before it; so the samples of the first block
    of a module list are on the host, and so are those of blocks that are tuned together.

    :param choice: ``auto``; ``none``: on the device that the block runs on; ``cpu``: on the host
    :param free: bytes that can still be allocated on a device; None where it does not say
    """

    def __init__(
        self,
        choice: str = "cpu",
        free: Callable[[torch.device], int | None] = free_memory,
    ):
        self.choice = choice
        self._free = free
        self._samples: dict[str, int] = {}  # bytes of those of the last block, by module list
        self._taken_by_tuning: float | None = None  # bytes for each weight
        self._taken_by_recording = 0

    def choose(self, block: nn.Module, blocks: str, device: torch.device) -> torch.device:
        """
        Called before the first sample of a block is kept.

        :param blocks: name of its module list
        :param device: that it runs on
        :return: where to keep all its samples
        """
        if self.choice == "none":
            return device
        needed = self._samples.get(blocks)
        return HOST if needed is None else self.where_fits(block, needed, device)

    def where_fits(self, block: nn.Module, needed: int, device: torch.device) -> torch.device:
        """
        :param block: that will be tuned
        :param needed: bytes of its samples
        :param device: that it runs on
        :return: the device, or the host
        """
        if self.choice == "none":
            return device
        if self.choice == "cpu" or device.type == "cpu" or self._taken_by_tuning is None:
            return HOST
        free = self._free(device)
        weights = stored_parameters([block])
        tuning = self._taken_by_tuning * sum(x.numel() for x in weights)
        needed += sum(x.nbytes for x in weights if x.device.type != device.type)
        needed += round(max(tuning, self._taken_by_recording))
        return HOST if free is None or needed > (1 - RESERVE) * free else device

    def recorded(self, blocks: str, samples: int) -> None:
        """
        :param blocks: name of a module list, of which a block was recorded
        :param samples: bytes of its samples
        """
        self._samples[blocks] = samples

    def called(self, taken: int) -> None:
        """:param taken: bytes that a call of a block took at most while it was recorded"""
        self._taken_by_recording = max(self._taken_by_recording, taken)

    def tuned(self, blocks: list[nn.Module], taken: int) -> None:
        """
        :param blocks: a group that was just tuned
        :param taken: bytes that this took at most, beside samples and weights
        """
        if len(blocks) > 1 and self.choice == "auto":
            self.choice = "cpu"
        weights = sum(x.numel() for x in stored_parameters(blocks))
        self._taken_by_tuning = max(taken / max(1, weights), self._taken_by_tuning or 0.0)

    def give_up(self, name: str) -> None:
        """
        Keep samples on the host from here on.

        :param name: of the group of blocks for which memory was short
        """
        self.choice = "cpu"
        logger.warning(
            f"{name}: the memory of the accelerator does not hold the calibration samples beside "
            "what tuning takes. They are on the host from here on, which takes longer "
            "(`offload_device: cpu` keeps them there from the start)"
        )
