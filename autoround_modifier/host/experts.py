"""Experts of mixtures, as LLM-Compressor splits them into linear layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe import context
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D

__all__ = ["LinearExperts2D", "all_experts_see_all_tokens", "routed_experts_only"]


def all_experts_see_all_tokens() -> bool:
    """
    :return: whether each expert now computes for all tokens of a call (`moe_calibration_context`),
        and not only for those that the router gave it
    """
    return context.get_calibrate_all_experts_flag()


@contextlib.contextmanager
def routed_experts_only() -> Iterator[None]:
    """Let experts compute for no other tokens than those routed to them."""
    with patch_attr(context, "_CALIBRATE_ALL_EXPERTS", False):
        yield
