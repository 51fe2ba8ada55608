"""Where captured samples are kept: on the accelerator while they fit there, else on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from loguru import logger
from torch import Tensor, nn

from autoround_modifier.device import free_memory

__all__ = ["CHAINED", "HOST", "RECORDED", "RESERVE", "SamplePlacement"]

HOST = torch.device("cpu")
# Hidden states of each sample: what a block takes and gives, which is recorded, and what it takes
# once the blocks before it are quantized.
RECORDED, CHAINED = 2, 1
# Share of the free memory that is left to what was not foreseen.
RESERVE = 0.1


class SamplePlacement:
    """
    Decides for each block where its samples are kept. What tuning takes beside them is known once a
    group of blocks has been tuned, so the samples of the first group are on the host.

    :param choice: ``auto``; ``none``: on the device that the block runs on; ``cpu``: on the host
    :param num_samples: largest number that is kept of each block; None where nobody knows
    :param free: bytes that can still be allocated on a device
    """

    def __init__(
        self,
        choice: str = "cpu",
        num_samples: int | None = None,
        free: Callable[[torch.device], int] = free_memory,
    ):
        self.choice = choice
        self.num_samples = num_samples
        self._free = free
        self._taken_by_tuning: float | None = None  # bytes for each weight
        self._promised: dict[nn.Module, float] = {}

    def choose(
        self, block: nn.Module, hidden: Tensor, others: Iterable[Tensor] = ()
    ) -> torch.device:
        """
        Called before the first sample of a block is kept.

        :param hidden: the hidden states of its first call, (batch, tokens, hidden), on the device
            that it runs on
        :param others: tensors among the other arguments of that call
        :return: where to keep all samples of the block
        """
        if self.choice == "none":
            return hidden.device
        if self.num_samples is None:
            return HOST
        batch = len(hidden) if hidden.ndim == 3 else 1
        sample = (RECORDED * hidden.nbytes + sum(x.nbytes for x in others)) / batch
        needed = self.num_samples * sample
        device = self.where_fits(block, needed, hidden.device)
        if device != HOST:
            self._promised[block] = needed
        return device

    def where_fits(self, block: nn.Module, needed: float, device: torch.device) -> torch.device:
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
        needed += self._taken_by_tuning * _num_weights([block])
        needed += sum(self._promised.values())
        return device if needed <= (1 - RESERVE) * self._free(device) else HOST

    def popped(self, block: nn.Module) -> None:
        """The samples of a block are all there, and no more are promised."""
        self._promised.pop(block, None)

    def tuned(self, blocks: list[nn.Module], taken: int) -> None:
        """
        :param blocks: a group that was just tuned
        :param taken: bytes that this took at most, beside samples and weights
        """
        share = taken / max(1, _num_weights(blocks))
        self._taken_by_tuning = max(share, self._taken_by_tuning or 0.0)

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


def _num_weights(blocks: list[nn.Module]) -> int:
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())
