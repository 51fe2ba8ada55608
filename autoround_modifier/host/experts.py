"""Experts of mixtures, as LLM-Compressor splits them into linear layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe import context
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D

__all__ = ["LinearExperts2D", "routed_experts_only"]


@contextlib.contextmanager
def routed_experts_only() -> Iterator[None]:
    """Let experts compute for no other tokens than those routed to them."""
    with patch_attr(context, "_CALIBRATE_ALL_EXPERTS", False):
        yield
