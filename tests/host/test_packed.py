"""host/packed.py: numbers that compressed-tensors packs."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from autoround_modifier.host.packed import unpack_e2m1, unpack_integers


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_integers_survive_packing(num_bits, dim):
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1)
    values = torch.randint(low, high, (5, 37), dtype=torch.int8)
    packed = pack_to_int32(values, num_bits, packed_dim=dim)
    words = -(-values.shape[dim] * num_bits // 32)
    assert packed.shape == ((words, 37) if dim == 0 else (5, words))
    assert torch.equal(unpack_integers(packed, num_bits, (5, 37), dim), values)


def test_the_first_integer_is_in_the_lowest_bits():
    """Offset by 2^(b-1): -8 is 0 and 7 is 15; integers of 3 bits may lie across two words."""
    packed = torch.tensor([[0x000000F0]], dtype=torch.int32)
    assert unpack_integers(packed, 4, (1, 3)).tolist() == [[-8, 7, -8]]
    packed = torch.tensor([[-(2**31), 1]], dtype=torch.int32)  # bits 31 and 32
    values = unpack_integers(packed, 3, (1, 11))
    assert values.tolist() == [[-4] * 10 + [2]]


def test_two_numbers_of_e2m1_are_in_one_byte():
    packed = torch.tensor([[0x10, 0xF7], [0x32, 0x98]], dtype=torch.uint8)
    expected = torch.tensor([[0.0, 0.5, 6.0, -6.0], [1.0, 1.5, -0.0, -0.5]])
    assert torch.equal(unpack_e2m1(packed), expected)
    assert torch.equal(pack_fp4_to_uint8(expected.bfloat16()), packed)
