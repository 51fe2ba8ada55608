"""Which attention implementation blocks are tuned with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from compressed_tensors.utils import patch_attr
from torch import nn

__all__ = ["sdpa_computes_the_same", "tuning_attention"]


def sdpa_computes_the_same(model: nn.Module) -> bool:
    """
    :return: whether PyTorch's scaled dot product attention gives what the model's own attention
        does. It does whatever implementation the model was loaded with, but for models that cap
        attention logits (Gemma 2) or have attention sinks (gpt-oss)
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(model, "_supports_sdpa", False):
        return False
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return False
    return all(getattr(module, "sinks", None) is None for module in model.modules())


@contextlib.contextmanager
def tuning_attention(model: nn.Module, sdpa: bool) -> Iterator[None]:
    """
    Calibration runs in eager attention, whose memory grows with the square of the length. Tuning
    runs in SDPA where that is allowed: the masks that were recorded fit both.

    :param sdpa: what `sdpa_computes_the_same` returned before calibration
    """
    if not sdpa:
        yield
        return
    with patch_attr(model.config, "_attn_implementation", "sdpa"):
        yield
