"""Which calibration samples each modifier of a run gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from autoround_modifier.host.lifecycle import Modifier
from autoround_modifier.modifiers.scale_distillation import ScaleDistillationModifier

__all__ = ["samples_of_the_pass"]


def samples_of_the_pass(
    dataset: Any, modifiers: Sequence[Modifier], kwargs: Mapping[str, Any]
) -> Any:
    """
    Scale distillation learns from all samples. The pass through the blocks often needs far fewer,
    and LLM-Compressor would run every sample through every block, so they are told apart where each
    modifier of the pass says how many samples it uses (``num_samples_used``).

    :param dataset: as `oneshot` gives it to LLM-Compressor
    :param kwargs: further arguments of `oneshot`
    :return: the samples of the pass; the distillation has taken the others as well
    """
    distillations = [x for x in modifiers if isinstance(x, ScaleDistillationModifier)]
    others = [x for x in modifiers if not isinstance(x, ScaleDistillationModifier)]
    used = [getattr(modifier, "num_samples_used", None) for modifier in others]
    known = [number for number in used if number is not None]
    if (
        not distillations
        or len(known) < len(used)
        or not isinstance(dataset, Dataset)
        or "input_ids" not in dataset.column_names
        or kwargs.get("shuffle_calibration_samples")
        or kwargs.get("batch_size", 1) != 1
    ):
        return dataset
    needed = max([1, *known])
    if needed >= len(dataset):
        return dataset
    for modifier in distillations:
        modifier.take_samples(dataset)
    return dataset.select(range(needed))
