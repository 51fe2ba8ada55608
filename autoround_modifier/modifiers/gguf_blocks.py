"""The layers that a run has tuned in types of GGUF, packed, until the model is saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from autoround_modifier.checkpoints.gguf_blocks import write_gguf_blocks
from autoround_modifier.exports.gguf_super_blocks import pack_weight
from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.host.saved_names import saved_name

__all__ = ["TunedBlocks"]


@dataclass
class TunedBlocks:
    """
    compressed-tensors cannot hold them: the model is saved with dequantized weights, and its blocks
    beside it.

    :ivar scheme: such as ``gguf:q4_k_m``; None where the recipe names none
    :ivar types: layer, by its name in the model -> name of its type
    :ivar packed: layer -> (out_features, bytes of a row), uint8, on the CPU
    """

    scheme: str | None = None
    types: dict[str, str] = field(default_factory=dict)
    packed: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, weight: QuantizedWeight) -> None:
        """Keep the blocks of a layer."""
        self.packed[name] = pack_weight(weight, self.types[name])

    def save(self, model: nn.Module, folder: Path) -> None:
        """
        :param model: whose layers they are
        :param folder: of the checkpoint, not complete yet
        :raises OSError: if the file cannot be written
        """
        if self.scheme is None or not self.packed:
            return
        renamed = saved_name(model)
        saved = {name: renamed(f"{name}.weight").removesuffix(".weight") for name in self.packed}
        write_gguf_blocks(
            folder,
            self.scheme,
            {saved[name]: self.types[name] for name in self.packed},
            {saved[name]: blocks for name, blocks in self.packed.items()},
        )
