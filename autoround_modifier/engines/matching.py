"""
How targets find their layers: by compressed-tensors, and by vLLM.

A target is a name, an expression after ``re:`` that must match from the beginning of a name, or the
name of a class. Both prefer names and expressions to classes. Where several match,
compressed-tensors 0.19 takes an exact name, else the alphabetically first expression; vLLM 0.32
takes the first in the order of ``config.json``, and the name of a fused layer before those of its
parts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from autoround_modifier.engines.fused import fused_name

__all__ = ["Groups", "compressed_tensors_group", "groups_of", "is_named", "vllm_group"]

# Group name -> its targets, in the order of the file
Groups = Mapping[str, Sequence[str]]


def groups_of(quantization: Mapping) -> dict[str, list[str]]:
    """
    :param quantization: ``quantization_config`` of a ``config.json``
    :return: the targets of each config group
    """
    groups = quantization.get("config_groups") or {}
    return {name: list(group.get("targets") or []) for name, group in groups.items()}


def is_named(name: str, targets: Iterable[str]) -> bool:
    """:return: whether one of the targets is this name, or an expression that matches it"""
    return any(_matches(name, target) for target in targets)


def compressed_tensors_group(name: str, classes: Iterable[str], groups: Groups) -> str | None:
    """
    :param name: of a layer
    :param classes: its class and their bases, by name
    :return: the group whose scheme compressed-tensors gives it
    """
    by_target = {target: group for group, targets in groups.items() for target in targets}
    for target in sorted(by_target, key=lambda target: ("re:" in target, target)):
        if _matches(name, target):
            return by_target[target]
    by_class = [target for target in sorted(by_target) if target in set(classes)]
    return by_target[by_class[0]] if by_class else None


def vllm_group(name: str, classes: Iterable[str], groups: Groups) -> str | None:
    """
    :return: the group whose scheme vLLM gives a layer of this name. Its own linear layers contain
        ``Linear`` in their class, whatever that of the model is called
    """
    pairs = [(target, group) for group, targets in groups.items() for target in targets]
    fused = fused_name(name)
    for known in (fused, name) if fused else (name,):
        for target, group in pairs:
            if _matches(known, target):
                return group
    kinds = {"Linear", *classes}
    return next((group for target, group in pairs if target in kinds), None)


@functools.lru_cache(maxsize=4096)
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return _compiled(target.removeprefix("re:")).match(name) is not None
    return target == name
