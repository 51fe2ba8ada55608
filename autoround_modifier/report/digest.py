"""The digest by which texts are recognised as token ids."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

__all__ = ["token_digest"]


def token_digest(samples: Iterable[Sequence[int]]) -> str:
    """
    :param samples: token ids of each, without padding
    :return: SHA-256 of all ids in their order, 8 bytes each, little-endian; hexadecimal
    """
    digest = hashlib.sha256()
    for ids in samples:
        digest.update(struct.pack(f"<{len(ids)}q", *ids))
    return digest.hexdigest()
