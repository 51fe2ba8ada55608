"""The quantized chain: what each block will see once the blocks before it are quantized."""

from __future__ import annotations

from torch import Tensor

from autoround_modifier.blocks.samples import fingerprint
from autoround_modifier.parallel import gathered

__all__ = ["QuantizedChain"]


class QuantizedChain:
    """
    Holds the output of the last tuned blocks with their quantized weights, and fingerprints of
    their full-precision output, by which the block that follows them is recognised.

    :ivar outputs: (1, tokens, hidden) per sample of this process, which may have none
    :ivar active: whether there is a chain
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.active = False
        self._fingerprints: list[int] = []

    def advance(self, outputs: list[Tensor], full_precision: list[Tensor]) -> None:
        """
        :param outputs: (1, tokens, hidden) per sample, from the quantized blocks
        :param full_precision: the same from the full-precision blocks
        """
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
