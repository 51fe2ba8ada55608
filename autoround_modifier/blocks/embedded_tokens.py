"""
Which token ids each batch has, so that samples are recognised by them.

What the first block sees has the same bits on every device only where it is the output of the token
embeddings. Where it is computed from them (BERT's norm, images among the text), another device or
driver changes the last bits; token ids stay the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autoround_modifier.blocks.samples import fingerprint

__all__ = ["EmbeddedTokens"]


class EmbeddedTokens:
    """Records each call of the token embeddings by the number of its batch."""

    def __init__(self) -> None:
        self._calls: dict[int, list[tuple[Tensor, int]]] = {}  # ids and fingerprint of the output

    @torch.no_grad()
    def record(self, batch: int, args: tuple[Any, ...], output: Any) -> None:
        """
        :param batch: number of the batch that runs
        :param args: of the embeddings; token ids, (samples, tokens), are recorded
        :param output: what the embeddings gave
        """
        ids = args[0] if args else None
        if isinstance(ids, Tensor) and isinstance(output, Tensor) and ids.ndim == 2:
            kept = ids.detach().to("cpu", torch.int64, copy=True)
            self._calls.setdefault(batch, []).append((kept, fingerprint(output)))

    @torch.no_grad()
    def ids_of(self, batch: int, hidden: Tensor) -> Tensor | None:
        """
        :param batch: number of the batch that runs
        :param hidden: what the first block sees: (samples, tokens, hidden), or, in other shapes,
            one sample (`split_call`)
        :return: (samples, tokens), int64, on the CPU: the token ids at its positions, or all of the
            batch for one sample; None if it is the output of the embeddings itself, or they are
            not known
        """
        calls = self._calls.get(batch, [])
        found = fingerprint(hidden)
        if any(found == known for _, known in calls):
            return None
        if hidden.ndim != 3:
            return calls[0][0].view(1, -1) if calls else None
        return next((ids for ids, _ in calls if ids.shape == hidden.shape[:2]), None)
