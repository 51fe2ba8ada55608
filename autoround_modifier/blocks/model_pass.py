"""One forward pass of the whole model on a calibration batch."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from autoround_modifier.errors import RecipeError

__all__ = ["POSITIONS", "counting_positions", "forward_arguments", "model_logits"]

# Positions whose logits are in float32 at the same time.
POSITIONS = 256


def forward_arguments(batch: dict[str, Any]) -> dict[str, Any]:
    """:return: what of a calibration batch is for the model's forward"""
    return {key: value for key, value in batch.items() if key not in ("labels", "loss_mask")}


def model_logits(
    model: nn.Module, inputs: dict[str, Any], positions: Tensor | None = None
) -> Tensor:
    """
    :param inputs: `forward_arguments`
    :param positions: of each sample whose logits are wanted, int64; None for all
    :return: (batch, positions, vocabulary), in the model's dtype, on its device
    :raises RecipeError: if the model has no head that predicts tokens
    """
    device = next(model.parameters()).device
    moved = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }
    if positions is not None and "logits_to_keep" in signature(model.forward).parameters:
        moved["logits_to_keep"] = positions.to(device)  # the head runs on these alone
        positions = None
    output = model(**moved, use_cache=False)
    if getattr(output, "logits", None) is None:
        raise RecipeError(
            f"{type(model).__name__} predicts no tokens (its output has no logits), so no "
            "divergence can be measured; give a model with a head (`...ForCausalLM`)"
        )
    return output.logits if positions is None else output.logits[:, positions.to(device)]


def counting_positions(batch: dict[str, Any], shape: torch.Size) -> Tensor | None:
    """
    :param shape: (batch, length)
    :return: which positions count, by ``attention_mask`` and ``loss_mask``: (batch, length), bool,
        on the CPU; None if every position counts
    """
    counts = torch.ones(shape, dtype=torch.bool)
    for name in ("attention_mask", "loss_mask"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.shape == shape:
            counts &= mask.bool().cpu()
    return None if bool(counts.all()) else counts
