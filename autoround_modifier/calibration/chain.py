"""The quantized chain: what each block will see once the blocks before it are quantized."""

from __future__ import annotations

from torch import Tensor

from autoround_modifier.calibration.samples import fingerprint

__all__ = ["QuantizedChain"]


class QuantizedChain:
    """
    Holds the output of the last tuned blocks with their quantized weights, and fingerprints of
    their full-precision output, by which the block that follows them is recognised.

    :ivar outputs: (1, tokens, hidden) per sample; empty where there is no chain
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self._fingerprints: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.outputs)

    def advance(self, outputs: list[Tensor], full_precision: list[Tensor]) -> None:
        """
        :param outputs: (1, tokens, hidden) per sample, from the quantized blocks
        :param full_precision: the same from the full-precision blocks
        """
        self.outputs = outputs
        self._fingerprints = [fingerprint(hidden) for hidden in full_precision]

    def take(self, full_precision: list[Tensor]) -> list[Tensor] | None:
        """
        :param full_precision: a block's full-precision inputs
        :return: its inputs from the quantized chain; None if the chain does not lead to it
        """
        outputs, self.outputs = self.outputs, []
        if [fingerprint(hidden) for hidden in full_precision] != self._fingerprints:
            return None
        return outputs
