"""Gradient of the cross entropy by the logits; labels are sampled or read from the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autoround_modifier.blocks.model_pass import POSITIONS, counting_positions
from autoround_modifier.blocks.samples import content_key
from autoround_modifier.errors import NonFiniteError

__all__ = ["CrossEntropyGradient"]


class CrossEntropyGradient:
    """
    :param sampled_labels: draw labels from the model's own predictions; false for the next tokens
        of the text
    :param seed: fixes the labels that are drawn
    :ivar num_tokens: positions that counted so far
    """

    def __init__(self, sampled_labels: bool, seed: int):
        self.sampled_labels = sampled_labels
        self.seed = seed
        self.num_tokens = 0

    def __call__(self, logits: Tensor, batch: dict[str, Any], index: int) -> Tensor:
        """
        :param logits: (batch, length, vocabulary)
        :param batch: with ``input_ids``, (batch, length)
        :param index: number of the batch, for messages
        :return: gradient of the cross entropy, summed over the positions that count; of the shape
            and dtype of ``logits``
        :raises NonFiniteError: if a position that counts has NaN or infinity
        """
        mask = counting_positions(batch, logits.shape[:2])
        gradient = torch.zeros_like(logits)
        for row, ids in enumerate(batch["input_ids"]):
            counts = torch.ones(len(ids), dtype=torch.bool) if mask is None else mask[row]
            positions = counts.nonzero().squeeze(-1)
            if not len(positions):
                continue
            real = logits.detach()[row, positions.to(logits.device)]
            if not torch.isfinite(real).all():
                raise NonFiniteError(
                    f"the original's output has NaN or infinity in calibration batch {index}; load "
                    "the model in bfloat16 or float32"
                )
            self.num_tokens += len(positions)
            labels = self._labels(ids.cpu(), positions, real)
            rows = gradient[row]
            for part, where, wanted in zip(
                real.split(POSITIONS),
                positions.split(POSITIONS),
                labels.split(POSITIONS),
                strict=True,
            ):
                slope = part.float().softmax(-1)
                slope.scatter_add_(-1, wanted.unsqueeze(-1), -torch.ones_like(slope[:, :1]))
                rows[where.to(rows.device)] = slope.to(rows.dtype)
            if not self.sampled_labels:
                rows[positions[-1]] = 0  # nothing follows
        return gradient

    def _labels(self, ids: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        """
        :param ids: (length,), of one sample
        :param positions: (tokens,), those that count
        :param logits: (tokens, vocabulary)
        :return: (tokens,), the wanted next tokens, on the device of the logits
        """
        if not self.sampled_labels:
            return ids.roll(-1)[positions].to(logits.device)
        # Drawn on the CPU and by the content of the sample: the same on any device, in any batch.
        key = int.from_bytes(content_key(ids[positions], None)[:7], "little")
        generator = torch.Generator().manual_seed(key ^ self.seed)
        drawn = [
            torch.multinomial(part.float().softmax(-1).cpu(), 1, generator=generator)
            for part in logits.split(POSITIONS)
        ]
        return torch.cat(drawn).squeeze(-1).to(logits.device)
