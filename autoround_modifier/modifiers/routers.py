"""Linear layers that keep their precision: routers, and classes that compute something else."""

from __future__ import annotations

import copy
import re

import torch
from loguru import logger
from torch import Tensor, nn

from autoround_modifier.errors import listed
from autoround_modifier.host.matching import match_named_modules, match_targets
from autoround_modifier.host.schemes import QuantizationConfig

__all__ = ["ignored_layers", "unlike_linear", "untargeted_routers"]

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


@torch.no_grad()
def unlike_linear(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """
    Targeted layers whose class is derived from Linear and computes something else, such as routers
    that return the chosen experts, or a product by groups of channels. A quantized layer computes
    what a linear layer does, so these cannot be quantized.

    :return: their names
    """
    targets = [target for scheme in config.config_groups.values() for target in scheme.targets]
    found, usual = [], {nn.Linear: True}
    for name, module in match_named_modules(model, targets, config.ignore):
        if isinstance(module, nn.Linear):
            if type(module) not in usual:
                usual[type(module)] = _computes_a_linear_layer(module)
            if not usual[type(module)]:
                found.append(name)
    return found


def _computes_a_linear_layer(layer: nn.Linear) -> bool:
    if type(layer).forward is nn.Linear.forward:
        return True
    if layer.weight.is_meta:
        layer = _with_numbers(layer)
    weight, bias = layer.weight, layer.bias
    x = torch.linspace(-1, 1, 3 * weight.shape[1], device=weight.device).view(1, 3, -1)
    x = x.to(weight.dtype)
    try:
        result = type(layer).forward(layer, x)
    except Exception:  # it takes something else
        return False
    expected = nn.functional.linear(x, weight, bias)
    return (
        isinstance(result, Tensor)
        and result.shape == expected.shape
        and torch.allclose(result.float(), expected.float(), rtol=1e-2, atol=1e-2)
    )


def _with_numbers(layer: nn.Linear) -> nn.Linear:
    """:return: a copy of a layer on the meta device that computes, with weights of some size"""
    copied = copy.deepcopy(layer).to_empty(device="cpu")
    for parameter in copied.parameters():
        parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    return copied


def ignored_layers(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """:return: `untargeted_routers` and those `unlike_linear`, which are logged"""
    routers = untargeted_routers(model, config)
    unlike = [name for name in unlike_linear(model, config) if name not in routers]
    if unlike:
        classes = sorted({type(model.get_submodule(name)).__name__ for name in unlike})
        logger.warning(
            f"{len(unlike)} layers stay as they are, because their class ({listed(classes)}) is "
            f"derived from Linear and computes something else: {listed(unlike)}"
        )
    if routers:
        logger.info(
            f"{len(routers)} routers of experts stay as they are, unless a target names them: "
            f"{listed(routers)}"
        )
    return [*routers, *unlike]
