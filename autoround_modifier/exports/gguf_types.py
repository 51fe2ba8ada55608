"""Types of blocks in GGUF files: their numbers in llama.cpp, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_TYPES", "BlockType", "Bytes", "register_types"]

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """
    :ivar name: as in the names of formats, such as ``q4_0``
    :ivar number: of the type in llama.cpp
    :ivar file_type: of a file of which most layers have it (``general.file_type``)
    :ivar block: input features of a block
    :ivar size: bytes of a block
    """

    name: str
    number: int
    file_type: int
    block: int
    size: int

    @property
    def bits(self) -> float:
        """Bits for each weight."""
        return 8 * self.size / self.block


BLOCK_TYPES: dict[str, BlockType] = {
    found.name: found
    for found in (
        BlockType("tq2_0", 35, 37, 256, 66),
        BlockType("q2_0", 42, 41, 64, 18),
        BlockType("mxfp4", 39, 38, 32, 17),
        BlockType("nvfp4", 40, 39, 64, 36),
        BlockType("q4_0", 2, 2, 32, 18),
        BlockType("q4_1", 3, 3, 32, 20),
        BlockType("q5_0", 6, 8, 32, 22),
        BlockType("q5_1", 7, 9, 32, 24),
        BlockType("q2_k", 10, 10, 256, 84),
        BlockType("q3_k", 11, 11, 256, 110),
        BlockType("q4_k", 12, 14, 256, 144),
        BlockType("q5_k", 13, 16, 256, 176),
        BlockType("q6_k", 14, 18, 256, 210),
        BlockType("q8_0", 8, 7, 32, 34),
    )
}


def register_types() -> None:
    """Let the installed `gguf` write types that are newer than it: 0.19 ends at type 41."""
    import gguf

    sizes = cast(dict[int, tuple[int, int]], gguf.GGML_QUANT_SIZES)
    for found in BLOCK_TYPES.values():
        sizes.setdefault(found.number, (found.block, found.size))
