"""Which hub is used, and whether it may be reached."""

from __future__ import annotations

import os
from typing import Literal

from autoround_modifier.errors import HubError

__all__ = ["PLATFORMS", "Platform", "chosen_platform", "is_offline"]

Platform = Literal["huggingface", "modelscope"]

# Spellings of each; `hf` and `model_scope` are those of auto-round
PLATFORMS: dict[str, Platform] = {
    "huggingface": "huggingface",
    "hf": "huggingface",
    "modelscope": "modelscope",
    "model_scope": "modelscope",
}
# Variables that choose ModelScope, our own first: the first that is set decides
MODELSCOPE_VARIABLES = ("AUTOROUND_USE_MODELSCOPE", "AR_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
_TRUE = ("1", "true", "yes", "on")


def chosen_platform(name: str | None = None) -> Platform:
    """
    :param name: one of `PLATFORMS`; None for what the environment says, by
        ``AUTOROUND_USE_MODELSCOPE``, ``AR_USE_MODELSCOPE`` or ``VLLM_USE_MODELSCOPE``, and
        Hugging Face if it says nothing
    :raises HubError: if there is no such platform
    """
    if name is not None:
        platform = PLATFORMS.get(name.lower())
        if platform is None:
            raise HubError(f"unknown platform `{name}`; use one of {', '.join(PLATFORMS)}")
        return platform
    for variable in MODELSCOPE_VARIABLES:
        value = os.environ.get(variable, "").strip().lower()
        if value:
            return "modelscope" if value in _TRUE else "huggingface"
    return "huggingface"


def is_offline() -> bool:
    """:return: whether ``HF_HUB_OFFLINE`` forbids the network; it holds for ModelScope too"""
    from huggingface_hub import is_offline_mode

    return is_offline_mode()
