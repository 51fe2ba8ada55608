"""The quantized chain: what each block will see once the blocks before it are quantized."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import cast

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from autoround_modifier.blocks.samples import fingerprint
from autoround_modifier.parallel import gathered

__all__ = ["QuantizedChain"]


class QuantizedChain:
    """
    Holds the output of the last tuned blocks with their quantized weights, and fingerprints of
    their full-precision output, by which the block that follows them is recognised.

    :ivar outputs: (1, tokens, hidden) per sample of this process, which may have none
    :ivar active: whether there is a chain
    :ivar written: what quantized blocks wrote into arguments, such as keys and values that later
        blocks share, by the tensors that hold the same from the full-precision blocks; kept as long
        as the arguments of a later block hold these
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.active = False
        self.written = cast(MutableMapping[Tensor, Tensor], WeakTensorKeyDictionary())
        self._fingerprints: list[int] = []

    def advance(
        self,
        outputs: list[Tensor],
        full_precision: list[Tensor],
        written: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """
        :param outputs: (1, tokens, hidden) per sample, from the quantized blocks
        :param full_precision: the same from the full-precision blocks
        :param written: what the quantized blocks wrote into their arguments, by the tensors that
            hold the same from the full-precision blocks
        """
        self.written.update(written or {})
        self.outputs = outputs
        self.active = True
        self._fingerprints = [fingerprint(hidden) for hidden in full_precision]

    def take(self, full_precision: list[Tensor]) -> list[Tensor] | None:
        """
        :param full_precision: a block's full-precision inputs
        :return: its inputs from the quantized chain; None if the chain does not lead to it, in
            this process or in another
        """
        outputs, self.outputs, self.active = self.outputs, [], False
        leads_on = [fingerprint(hidden) for hidden in full_precision] == self._fingerprints
        return outputs if all(gathered(leads_on)) else None
