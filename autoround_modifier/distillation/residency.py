"""Whether the weights of a model stay on its device while scales are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from loguru import logger
from torch import nn

from autoround_modifier.device import free_memory
from autoround_modifier.distillation.scales import StreamedScale, TrainedScale
from autoround_modifier.distillation.trainable import trainable_norms
from autoround_modifier.host.layers import (
    disable_offloading,
    kept_onloaded,
    offloaded_bytes,
)

__all__ = ["fits", "weights_on_device"]

# Of the bytes of weights in 16 bits: these, and their integers of a byte each.
HELD = 1.5
# Share of the free memory that weights may take; the rest is for activations and logits.
SHARE = 0.5


def fits(weights: float, free: float | None) -> bool:
    """
    :param weights: bytes of weights in 16 bits
    :param free: bytes of free memory; None where that is not known
    :return: whether the weights stay on the device
    """
    return free is None or HELD * weights <= SHARE * free


@contextlib.contextmanager
def weights_on_device(model: nn.Module) -> Iterator[type[TrainedScale]]:
    """
    Bring offloaded weights to the device for as long as the context lasts, if half of its free
    memory holds them. If not, they are brought there for each use, all but gains and biases.

    :return: what trains the scales of the model's layers
    """
    too_large = {
        device: size
        for device, size in offloaded_bytes(model).items()
        if not fits(size, free_memory(device))
    }
    if too_large:
        for device, size in too_large.items():
            logger.info(
                f"{HELD * size / 1e9:.1f} GB of weights and integers do not fit into half of the "
                f"free memory of {device}, so each weight is brought there when it is used"
            )
        with kept_onloaded(trainable_norms(model)):
            yield StreamedScale
    else:
        with disable_offloading():
            yield TrainedScale
