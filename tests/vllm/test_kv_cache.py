"""How vLLM's CPU kernel rounds what it caches in FP8: why that row has a tolerance of its own."""

from __future__ import annotations

import torch
from vllm import _custom_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

HEADS, TOKENS, HEAD_DIM, BLOCK = 1, 32, 64, 32


def cached(states: torch.Tensor) -> torch.Tensor:
    """:return: magnitudes in the key cache after keys (tokens, heads, head_dim) were written"""
    caches = torch.zeros(2, 1, HEADS, BLOCK, HEAD_DIM, dtype=torch.uint8)
    slots = torch.arange(TOKENS)
    isa = _get_attn_isa(torch.bfloat16, BLOCK, HEAD_DIM, "fp8")
    _custom_ops.cpu_attn_reshape_and_cache(states, states, *caches, slots, isa, 1.0, 1.0, "fp8")
    return caches[0].view(torch.float8_e4m3fn).float().unique()


def test_towards_zero_not_to_nearest() -> None:
    """When this fails, vLLM has learnt to round, and the row's tolerance should go."""
    between = torch.full((TOKENS, HEADS, HEAD_DIM), 1.24, dtype=torch.bfloat16)
    assert cached(between).tolist() == [1.125]  # 1.25 is nearer
    exact = torch.full((TOKENS, HEADS, HEAD_DIM), 1.25, dtype=torch.bfloat16)
    assert cached(exact).tolist() == [1.25]
