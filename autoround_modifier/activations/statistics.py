"""What was seen of one activation, by LLM-Compressor's observers, over all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoround_modifier.errors import CalibrationError
from autoround_modifier.host.activations import (
    Observer,
    new_observer,
    observer_reductions,
    observer_scales,
)
from autoround_modifier.host.schemes import QuantizationArgs
from autoround_modifier.parallel import gathered, is_distributed

__all__ = ["DEFAULT_OBSERVER", "ActivationStatistics"]

DEFAULT_OBSERVER = "static_minmax"


class ActivationStatistics:
    """
    :param name: of the module, for messages
    :param base_name: ``input``, ``k`` or ``v``
    :param args: how the activation is quantized; has a static scale
    """

    def __init__(self, name: str, base_name: str, args: QuantizationArgs):
        self.name = name
        self.base_name = base_name
        self.args = args
        self._current: Observer | None = None
        self._earlier: Observer | None = None

    @torch.no_grad()
    def record(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """
        :param x: an activation; see `ActivationQuantizer`
        :param token_mask: (batch, tokens), bool, False for padding; without effect on layers that
            see tokens in another arrangement, such as routed experts
        """
        if self._current is None:
            self._current = self._new_observer()
        if self.base_name == "input":
            if token_mask is not None and x.shape[:-1] == token_mask.shape:
                x = x[token_mask]
            x = x.reshape(1, -1, x.shape[-1])
        elif token_mask is not None:
            by_token = x.transpose(1, 2)  # (batch, tokens, heads, head_dim)
            x = by_token[token_mask].unsqueeze(0).transpose(1, 2)
        self._current(x)

    def restart(self) -> None:
        """Set aside what was recorded; it counts only if nothing is recorded from now on."""
        self._earlier, self._current = self._current, None

    @property
    def found(self) -> bool:
        """Whether anything was recorded that a scale can be computed from."""
        return self._best() is not None

    def scales(self) -> dict[str, Tensor | None] | None:
        """:return: ``scale``, ``zero_point``, ``global_scale``; None if nothing was recorded"""
        observer = self._best()
        return None if observer is None else observer_scales(observer)

    def synchronize(self, device: torch.device) -> None:
        """
        Add what other processes recorded; without effect if there are none.

        :param device: of the module
        :raises CalibrationError: if the observer keeps anything but minima and maxima
        """
        if not is_distributed():
            return
        # What was recorded earlier counts only where no process has recorded anything since.
        current = self._current if self._current and self._current.has_statistics else None
        anyone = any(gathered(current is not None))
        observer = (current if anyone else self._best()) or self._new_observer()
        reduce: dict[Any, Any] = {dist.ReduceOp.MIN: torch.amin, dist.ReduceOp.MAX: torch.amax}
        kinds = observer_reductions(observer)
        if not kinds or any(kind not in reduce for kind in kinds.values()):
            raise CalibrationError(
                f"{self.name}: several processes cannot share what observer `{self.args.observer}` "
                f"recorded; use `observer: {DEFAULT_OBSERVER}`"
            )
        mine = {name: getattr(observer, name).cpu() for name in kinds if observer.has_statistics}
        shares = [share for share in gathered(mine) if share]
        for name, kind in kinds.items():
            if shares:
                seen = torch.stack([share[name] for share in shares])
                setattr(observer, name, reduce[kind](seen, 0).to(device))
        if shares:
            self._current = observer

    def _new_observer(self) -> Observer:
        return new_observer(self.args.observer or DEFAULT_OBSERVER, self.base_name, self.args)

    def _best(self) -> Observer | None:
        seen = (x for x in (self._current, self._earlier) if x is not None and x.has_statistics)
        return next(seen, None)
