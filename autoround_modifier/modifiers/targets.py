"""Says which entries of a recipe's ``targets`` and ``ignore`` do nothing, or are not unique."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from loguru import logger
from torch import nn

from autoround_modifier.errors import listed
from autoround_modifier.host.matching import is_match, match_targets
from autoround_modifier.host.schemes import QuantizationConfig

__all__ = ["unmatched_hint", "warn_of_targets"]


def warn_of_targets(
    model: nn.Module, config: QuantizationConfig, beside: Iterable[str] = ()
) -> None:
    """
    Log entries of ``ignore`` and ``targets`` that match no linear layer or embedding, groups that
    get no layer, and layers that targets of several groups match.

    :param beside: names of layers that are quantized beside the model (multi-token prediction)
    :raises RecipeError: if an expression is not valid
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    for entry in config.ignore or ():
        if not any(is_match(name, layer, entry) for name, layer in layers.items()):
            logger.warning(f"`ignore`: `{entry}` matches no layer{unmatched_hint(entry, layers)}")
    owners = {
        target: group for group, scheme in config.config_groups.items() for target in scheme.targets
    }
    matched: dict[str, list[str]] = {}
    first: dict[str, str] = {}  # layer -> the target that decides
    for name, layer in layers.items():
        if is_match(name, layer, config.ignore or ()):
            continue
        found = match_targets(name, layer, owners)
        for target in found:
            matched.setdefault(target, []).append(name)
        if found:
            first[name] = found[0]
    for target, group in owners.items():
        if target not in matched and len(owners) > 1 and not any(_named(target, x) for x in beside):
            logger.warning(
                f"`targets` of {group}: `{target}` matches no layer"
                + unmatched_hint(target, layers)
            )
    _warn_of_overlaps(matched, first, owners)


def _warn_of_overlaps(
    matched: dict[str, list[str]], first: dict[str, str], owners: dict[str, str]
) -> None:
    """
    :param matched: target -> layers that it matches
    :param first: layer -> target that decides
    :param owners: target -> config group
    """
    for target, names in matched.items():
        if not _is_expression(target):
            continue  # a class is meant for what no expression matches
        lost = [
            name
            for name in names
            if owners[first[name]] != owners[target] and _is_expression(first[name])
        ]
        if lost:
            winner = first[lost[0]]
            nothing = " It gets no layer at all." if len(lost) == len(names) else ""
            logger.warning(
                f"`{winner}` of {owners[winner]} and `{target}` of {owners[target]} both match "
                f"{listed(lost, 3)}; `{winner}` is taken, the first in the alphabet.{nothing} "
                "Write expressions of which one matches each layer."
            )


def unmatched_hint(entry: str, names: Iterable[str]) -> str:
    """
    :param entry: of a recipe, that matches none of the names
    :param names: of layers
    :return: end of a message: what it may have meant; nothing if that cannot be told
    """
    names = list(names)
    plain = entry.removeprefix("re:")
    meant = None
    if not entry.startswith("re:"):
        stem = plain.strip("*").strip(".")
        if any(name.startswith(f"{stem}.") for name in names):
            meant = f"re:{re.escape(stem)}\\..*"
        elif any(name == stem or name.endswith(f".{stem}") for name in names):
            meant = stem if stem in names else f"re:.*\\.{re.escape(stem)}$"
    if meant is None:
        words = re.findall(r"\w{3,}", plain)
        last = words[-1] if words else plain
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
        near = difflib.get_close_matches(last, list(leaves), n=2)
        if not near:
            return f"; layers are named like {listed(list(leaves), 6)}" if leaves else ""
        return f"; the nearest layers are named {' and '.join(f'`{x}`' for x in near)}"
    return f"; did you mean `{meant}`?"


def _named(target: str, name: str) -> bool:
    return is_match(name, nn.Linear(1, 1, device="meta"), target)


def _is_expression(target: str) -> bool:
    return target.startswith("re:") or "." in target
