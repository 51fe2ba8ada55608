"""Routers of experts: linear layers that keep their precision unless a target names them."""

from __future__ import annotations

import re

from loguru import logger
from torch import nn

from autoround_modifier.errors import listed
from autoround_modifier.host.matching import match_named_modules, match_targets
from autoround_modifier.host.schemes import QuantizationConfig

__all__ = ["log_untargeted_routers", "untargeted_routers"]

# What the linear layers that choose or weigh experts are called in Transformers' models, or the
# modules that hold them (`router.proj`, `gate.wg`). A `gate` is one only beside `experts`.
_ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})


def untargeted_routers(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """
    Linear layers that choose experts, or weigh a shared one, and are targeted only because they
    are linear. They are small, and a rounded one sends tokens to other experts, so they keep their
    precision unless a target is their name, or a regular expression with the word ``router``,
    ``gate`` or ``shared_expert_gate`` in it, whichever it is.

    :return: their names
    """
    targets = [target for scheme in config.config_groups.values() for target in scheme.targets]
    routers = []
    for name, module in match_named_modules(model, targets, config.ignore):
        word = _router_word(model, name) if isinstance(module, nn.Linear) else None
        if word is None:
            continue
        target = match_targets(name, module, targets)[0]
        if target != name and not _names(target, word):
            routers.append(name)
    return routers


def _router_word(model: nn.Module, name: str) -> str | None:
    """:return: the part of a module's name by which it is a router, or None"""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part in _ROUTERS:
            beside = dict(model.get_submodule(".".join(parts[:index])).named_children())
            if part != "gate" or "experts" in beside:
                return part
    return None


def _names(target: str, word: str) -> bool:
    return target.startswith("re:") and re.search(rf"\b{word}\b", target) is not None


def log_untargeted_routers(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """:return: `untargeted_routers`, which are logged"""
    routers = untargeted_routers(model, config)
    if routers:
        logger.info(
            f"{len(routers)} routers of experts stay as they are, unless a target names them: "
            f"{listed(routers)}"
        )
    return routers
