"""Files of a run, in bytes."""

from __future__ import annotations

from autoround_modifier.planning.counts import ModelCounts
from autoround_modifier.planning.quantities import Quantity
from autoround_modifier.planning.settings import RunSettings

__all__ = ["checkpoint_size", "disk_parts"]


def checkpoint_size(counts: ModelCounts, bits: float | None, whole_model: bool) -> Quantity:
    """
    :param bits: budget of an `AutoSchemeModifier` whose choice is open
    :param whole_model: whether the budget is a mean over all parameters
    :return: size of the checkpoint's tensors
    """
    if bits is None or not counts.chosen:
        return Quantity("the checkpoint", counts.saved)
    smallest, widest = counts.chosen_size
    rest = counts.saved - widest
    budget = bits / 8 * (counts.parameters if whole_model else counts.chosen)
    chosen = budget - rest if whole_model else budget
    size = rest + min(max(chosen, smallest), widest)
    return Quantity("the checkpoint, at most", size, "counted", "the budget of avg_bits")


def disk_parts(
    counts: ModelCounts,
    run: RunSettings,
    checkpoint: Quantity,
    original: Quantity | None,
    mtp_layers: int,
) -> list[Quantity]:
    """
    :param checkpoint: `checkpoint_size`
    :param original: files that must be downloaded; None if they are there
    :param mtp_layers: layers for multi-token prediction, which are copied in 16 bits
    :return: what is written
    """
    itemsize = counts.dtype.itemsize
    parts = [checkpoint, *counts.exports]
    if original is not None:
        parts.insert(0, original)
    if mtp_layers:
        largest = max(block.size for block in counts.blocks)
        joined = 2 * counts.hidden**2 * itemsize
        size = mtp_layers * (largest + joined)
        source = "each as large as the largest block, and a layer that joins two states"
        parts.append(Quantity("layers for multi-token prediction", size, "assumed", source))
    if run.model_on_disk:
        parts.append(Quantity("weights that changed, in the offload folder", counts.size))
    if run.checkpoint_dir:
        scale = itemsize + 1  # and the zero point
        kept = counts.quantized + scale * counts.quantized_groups
        parts.append(Quantity("finished blocks in checkpoint_dir", kept))
        if run.iters:
            chain = 2 * run.samples * run.length * counts.hidden * itemsize
            parts.append(Quantity("the quantized chain in checkpoint_dir", chain))
    return parts
