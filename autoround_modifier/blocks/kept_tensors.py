"""
Tensors that stay as they were recorded, in as little memory as possible.

A tensor that is already on the right device is not copied but shared with its owner, which keeps it
in memory anyway. In case a block writes into it (`x += ...`), a copy is made before the block runs,
and used if the version counter of the tensor has changed afterwards.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from autoround_modifier.blocks.samples import fingerprint

__all__ = ["KeptTensors", "version_of"]


def version_of(tensor: Tensor) -> int | None:
    """
    :return: how often the memory of a tensor was written to in place; None if PyTorch does not
        count that, as in inference mode
    """
    return None if tensor.is_inference() else tensor._version


class KeptTensors:
    """
    Keeps tensors on a device. Of what is given twice, one is kept: the same part of the same
    tensor, as long as the tensor exists and nobody has written into it; and equal content, where
    the caller asks for that.
    """

    def __init__(self) -> None:
        # All keys and values are weak references, so nothing is kept alive longer than needed, and
        # a new tensor at a freed address is not mistaken for the old one.
        self._kept: Any = WeakTensorKeyDictionary()  # tensor -> {part, version, device: kept}
        self._equal: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()
        self._shared: Any = WeakTensorKeyDictionary()  # kept -> version
        self._with_owner: Any = WeakTensorKeyDictionary()  # tensor -> [kept]
        self._backups: dict[int, tuple[Tensor, Tensor]] = {}  # id of kept: kept, its copy
        self._earlier_backups: dict[int, tuple[Tensor, Tensor]] = {}

    def next_call(self) -> None:
        """
        Call it before each call of a block is recorded, and before kept tensors are used. Tensors
        kept for the previous call are restored if they were written to since.
        """
        for kept, backup in self._backups.values():
            if kept in self._shared and kept._version != self._shared[kept]:
                kept.data = backup
                del self._shared[kept]
        self._earlier_backups, self._backups = self._backups, {}

    def release(self) -> None:
        """`next_call`, where no call follows."""
        self.next_call()
        self._earlier_backups = {}

    def keep(
        self, value: Tensor, device: torch.device, merge: bool = False, with_owner: bool = False
    ) -> Tensor:
        """
        :param value: a tensor, or a part of one
        :param device: where it is kept
        :param merge: return what is kept already if its content is equal
        :param with_owner: keep it at least as long as the tensor that ``value`` is a part of
        :return: same shape and content, without gradients
        """
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
            return value.detach().to(device, copy=True)
        if value.is_inference():
            return value.to(device, copy=True)
        owner = value._base if value._base is not None else value
        parts = self._kept.get(owner)
        if parts is None:
            parts = self._kept[owner] = WeakValueDictionary()
        layout = (value.storage_offset(), value.shape, value.stride(), value.dtype)
        part = (*layout, value._version, device)
        kept = parts.get(part)
        if kept is None:
            kept = parts[part] = self._merged(value, device) if merge else self._new(value, device)
        if with_owner:
            self._with_owner.setdefault(owner, []).append(kept)
        if kept in self._shared:
            self._back_up(kept)
        return kept

    def _new(self, value: Tensor, device: torch.device) -> Tensor:
        whole = value.untyped_storage().nbytes() <= value.nbytes
        if value.device == device and whole:
            kept = value.detach()  # has the version counter of ``value``
            self._shared[kept] = kept._version
            return kept
        # a copy also of a part, which would keep all of its tensor in memory
        return value.detach().to(device, copy=True)

    def _merged(self, value: Tensor, device: torch.device) -> Tensor:
        content = (value.shape, value.dtype, fingerprint(value), device)
        kept = self._equal.get(content)
        if kept is None or not torch.equal(kept, value.to(kept.device)):
            kept = self._equal[content] = self._new(value, device)
        return kept

    def _back_up(self, kept: Tensor) -> None:
        if id(kept) not in self._backups:
            earlier = self._earlier_backups.pop(id(kept), None)
            self._backups[id(kept)] = earlier or (kept, kept.clone())
