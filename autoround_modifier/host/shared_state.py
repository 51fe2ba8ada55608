"""
Models whose blocks write what later blocks read, beside the hidden states.

Gemma 3n and the Gemma 4 models of the E kind share keys and values in a dict that all blocks are
called with. The sequential pipeline of LLM-Compressor 0.14 gives each subgraph a copy of it, so
that the second finds nothing; the basic pipeline runs the model as it is.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

__all__ = ["SHARED_STATE_PIPELINE", "blocks_share_state", "config_shares_state"]

# The pipeline of LLM-Compressor in which such models run
SHARED_STATE_PIPELINE = "basic"


def blocks_share_state(model: nn.Module) -> bool:
    """:return: whether blocks of the model read what earlier ones wrote into an argument"""
    return any(getattr(module, "is_kv_shared_layer", False) for module in model.modules())


def config_shares_state(config: PreTrainedConfig) -> bool:
    """:return: the same, of the model that a configuration describes"""
    text: Any = config.get_text_config()
    return bool(getattr(text, "num_kv_shared_layers", None))
