"""Packs integers into 32-bit words, without gaps, the lowest bits first."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_rows"]

WORD = 32


def pack_rows(codes: Tensor, num_bits: int) -> Tensor:
    """
    :param codes: (rows, columns), uint8, 0 to ``2 ** num_bits - 1``; columns are a multiple of 32
    :param num_bits: of an integer, 1 to 8
    :return: (rows, columns * num_bits / 32), int32: each row is one stream of bits, in which an
        integer may begin in one word and end in the next
    """
    rows, columns = codes.shape
    chunks = codes.reshape(rows, columns // WORD, WORD)
    words = torch.zeros(rows, columns // WORD, num_bits, dtype=torch.int64)
    for place in range(WORD):
        first = place * num_bits
        word, shift = divmod(first, WORD)
        wide = chunks[..., place].to(torch.int64) << shift
        words[..., word] |= wide & 0xFFFFFFFF
        if shift + num_bits > WORD:
            words[..., word + 1] |= wide >> WORD
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.to(torch.int32).reshape(rows, -1)
