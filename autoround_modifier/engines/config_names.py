"""
Writes ``ignore`` and ``targets`` of ``config.json`` so that every engine finds the same layers.

Transformers matches module paths; vLLM matches names of its own, into which it translates names of
the files, but not expressions. compressed-tensors and vLLM differ where several targets match a
layer. Transformers reads all experts by the first group with an expression that has ``experts`` in
it. And SGLang looks for layers that it fuses by their own names, as `qkv_proj`. So layers are named
under both spellings, fused ones are matched with their parts, expressions hold under any prefix, no
two groups match one layer, and the group of the experts comes first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autoround_modifier.engines.fused import LOOKED_UP, fused_names, fused_parts
from autoround_modifier.engines.matching import Groups, Names, Targets, groups_of
from autoround_modifier.engines.name_expressions import (
    NUMBER,
    block_of,
    by_shape,
    expression_for,
    expressions_for,
    shortest,
)

__all__ = ["EXPERT", "HEADS", "NamedLayer", "complete_config"]

# The number of an expert in the name of one of its layers
EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")
# A name below another one, without the number of a block
_OUTSIDE_BLOCKS = re.compile(r"(?!.*\.\d+\.).*\..*")
# What the linear layer that predicts tokens is called
HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class NamedLayer:
    """
    A linear layer or embedding of a model that is saved.

    :param path: of the module in the model
    :param saved: its name in the files
    :param group: config group of its scheme; None where it is not quantized
    :param kind: what it is to engines, whatever its class is called; ``Head`` for the linear layer
        that predicts tokens
    """

    path: str
    saved: str
    group: str | None
    kind: Literal["Linear", "Embedding", "Head"] = "Linear"

    @property
    def names(self) -> tuple[str, ...]:
        """Both spellings."""
        return (self.path,) if self.path == self.saved else (self.path, self.saved)

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to one of the experts that a router chooses from."""
        return EXPERT.search(self.path) is not None


def complete_config(quantization: dict[str, Any], layers: Sequence[NamedLayer]) -> dict[str, Any]:
    """
    :param quantization: ``quantization_config`` as the host writes it
    :param layers: all linear layers of the model, and the embeddings that are quantized
    :return: the same schemes under names that hold for every engine; the groups of the host where
        they hold already
    """
    groups = _experts_first(groups_of(quantization), layers)
    fused = list(_fused_layers(layers))
    quantized = [layer for layer in layers if layer.group is not None]
    with_fused = [*quantized, *(layer for layer in fused if layer.group is not None)]
    if not _all_hold(with_fused, groups, True) or not _experts_found(groups, layers):
        exact = {name: _exact(quantized, name, groups) for name in groups}
        tried = ((x, dict(_written_targets(x, groups))) for x in (with_fused, quantized))
        groups = next(
            (found for x, found in tried if _all_hold(x, found) and _all_match(found, quantized)),
            exact,
        )
    named = {
        f"group_{index}": {**quantization["config_groups"][name], "targets": targets}
        for index, (name, targets) in enumerate(groups.items())
    }
    own = dict.fromkeys(_ignored([*layers, *fused]))
    of_experts = Names(x for x in own if x.startswith("re:"))
    ignore = [
        entry
        for entry in quantization.get("ignore") or []
        if not (EXPERT.search(entry) and entry in of_experts)
    ]
    known = Names(ignore)
    ignore += [entry for entry in own if entry not in known]
    return {**quantization, "config_groups": named, "ignore": list(dict.fromkeys(ignore))}


def _fused_layers(layers: Iterable[NamedLayer]) -> Iterator[NamedLayer]:
    """Yield what engines make of layers of one scheme that they fuse, under its own name."""
    by_path = {x.path: x for x in layers if x.kind == "Linear" and not x.is_expert}
    for fused, paths in fused_parts(by_path):
        _, _, leaf = fused.rpartition(".")
        first, *others = (by_path[path] for path in paths)
        if leaf not in LOOKED_UP or any(x.group != first.group for x in others):
            continue
        stem, _, part = first.saved.rpartition(".")
        saved = f"{stem}.{leaf}" if stem and first.path.endswith(f".{part}") else fused
        yield NamedLayer(fused, saved, first.group)


def _ignored(layers: Sequence[NamedLayer]) -> Iterator[str]:
    """
    Yield names of the layers that are not quantized; for experts one expression for all of a block,
    if it matches no layer that is quantized.
    """
    quantized = [name for layer in layers if layer.group is not None for name in layer.names]
    shapes = by_shape(quantized)
    # one for all experts of a module, and the names under which vLLM fuses them
    taken = {EXPERT.sub("0", name) for name in quantized}
    taken |= {fused for name in taken for fused in fused_names(name)}
    usable: dict[str, bool] = {}
    for layer in layers:
        if layer.group is not None:
            continue
        for name in layer.names:
            outside = _OUTSIDE_BLOCKS.fullmatch(name) is not None  # vLLM moves some (Gemma 3n)
            if not outside and not layer.is_expert:
                yield name
                continue
            expression = expression_for(shortest(NUMBER.sub("#", name), shapes), block_of(name))
            if expression not in usable:
                matches = re.compile(expression.removeprefix("re:")).match
                usable[expression] = not any(matches(other) for other in taken)
            if outside or not usable[expression]:
                yield name
            if usable[expression]:
                yield expression


def _all_hold(layers: Iterable[NamedLayer], groups: Groups, anywhere: bool = False) -> bool:
    """
    :param anywhere: under another prefix as well, where an expression decides
    :return: whether every engine gives each layer its own scheme, under both spellings
    """
    targets, exact = Targets(groups), {x for targets in groups.values() for x in targets}
    for layer in layers:
        names = [(name, rule) for name in layer.names for rule in targets.rules]
        if anywhere and not exact.intersection(layer.names):
            names.append((f"prefix.{_from_blocks(layer.path)}", targets.vllm))
        if any(rule(name, layer.kind) != layer.group for name, rule in names):
            return False
    return True


def _all_match(groups: Groups, layers: Sequence[NamedLayer]) -> bool:
    """:return: whether each expression matches a layer; compressed-tensors warns of others"""
    names = [name for layer in layers for name in layer.names]
    used = {layer.group for layer in layers}
    expressions = [
        re.compile(target.removeprefix("re:"))
        for group, targets in groups.items()
        if group in used
        for target in targets
        if target.startswith("re:")
    ]
    return all(any(map(expression.match, names)) for expression in expressions)


def _from_blocks(name: str) -> str:
    """:return: the end of a name from the list of its blocks on"""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[max(first - 1, 0) :])


def _exact(layers: Iterable[NamedLayer], group: str, groups: Groups) -> list[str]:
    """:return: targets of a group: the names of its layers; of no layer, what it had"""
    names = [name for layer in layers if layer.group == group for name in layer.names]
    return names or list(groups[group])


def _experts_first(
    groups: dict[str, list[str]], layers: Iterable[NamedLayer]
) -> dict[str, list[str]]:
    """:return: the groups, those of experts before the others"""
    of_experts = {layer.group for layer in layers if layer.is_expert}
    return dict(sorted(groups.items(), key=lambda item: item[0] not in of_experts))


def _experts_found(groups: Groups, layers: Sequence[NamedLayer]) -> bool:
    """
    :return: whether Transformers would read the experts by their own scheme; true if there are
        none, or several schemes, which it cannot read at all
    """
    of_experts = {x.group for x in layers if x.is_expert and x.group is not None}
    if len(of_experts) != 1 or len(groups) == 1:
        return True
    named = [
        name
        for name, targets in groups.items()
        if any(target.startswith("re:") and "experts" in target for target in targets)
    ]
    return bool(named) and named[0] in of_experts


def _written_targets(
    layers: Sequence[NamedLayer], groups: Groups
) -> Iterator[tuple[str, list[str]]]:
    """Yield each group with expressions that match its layers and those of no other group."""
    owners: dict[str, str] = {}
    for layer in layers:
        assert layer.group is not None
        owners.update(dict.fromkeys(layer.names, layer.group))
    for group in groups:
        own = [name for name, owner in owners.items() if owner == group]
        others = [name for name, owner in owners.items() if owner != group]
        if own:
            classes = [x for x in groups[group] if x in ("Linear", "Embedding")]
            yield group, [*expressions_for(own, others), *classes]
        else:  # of attention
            yield group, list(groups[group])
