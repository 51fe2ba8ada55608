"""Which layers get one scheme together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from autoround_modifier.engines.check import required_engines
from autoround_modifier.errors import RecipeError
from autoround_modifier.host.layers import stored_weight
from autoround_modifier.host.matching import FUSED_LAYER_NAMES, match_named_modules

__all__ = ["Unit", "find_units"]

# Modules whose linear layers are the experts of one fused kernel
_EXPERTS = re.compile(r"(?P<experts>.*\bexperts)\.\d+\..+")


@dataclass(frozen=True)
class Unit:
    """
    Layers that get one scheme.

    :param name: display name: the common part of the names, and where they differ
    :param layers: names, in the order of the model
    :param targets: the same in the syntax of recipes: names, or patterns for many experts
    """

    name: str
    layers: tuple[str, ...]
    targets: tuple[str, ...]


def find_units(
    model: nn.Module,
    layers: Iterable[str],
    shared: Sequence[Sequence[str]] = (),
    engine: str = "vllm",
) -> list[Unit]:
    """
    Layers that engines fuse are one unit, and so are the experts of a block, which vLLM computes by
    one scheme. Transformers reads all experts of a model by one.

    :param layers: names of the layers that get a scheme, in the order of the model
    :param shared: further groups, each given by targets (names, ``re:`` patterns, classes)
    :param engine: that must load the checkpoint: one of `fields.ENGINES`
    :return: units in the order of their first layers; every layer is in one
    :raises RecipeError: if a target of ``shared`` matches none of the layers
    """
    names = list(layers)
    order = {name: index for index, name in enumerate(names)}
    parent = dict(zip(names, names, strict=True))

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    groups = (
        *_fused(model),
        *_experts(names, engine),
        *_tied(model),
        *_named(model, shared, order),
    )
    for group in groups:
        members = [name for name in group if name in order]
        for name in members[1:]:
            parent[root(name)] = root(members[0])
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(root(name), []).append(name)
    every = [name for name, _ in model.named_modules()]
    return [
        Unit(_common_name(members), tuple(members), _targets(members, every))
        for members in units.values()
    ]


def _fused(model: nn.Module) -> Iterator[list[str]]:
    for prefix, module in model.named_modules():
        for fused in FUSED_LAYER_NAMES:
            present = [name for name in fused if hasattr(module, name)]
            if len(present) > 1:
                yield [f"{prefix}.{name}" if prefix else name for name in present]


def _experts(names: list[str], engine: str) -> Iterator[list[str]]:
    experts: dict[str, list[str]] = {}
    for name in names:
        match = _EXPERTS.fullmatch(name)
        if match is not None:
            by_block = "transformers" not in required_engines(engine)
            together = match["experts"] if by_block else ""
            experts.setdefault(together, []).append(name)
    yield from experts.values()


def _tied(model: nn.Module) -> Iterator[list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            owners.setdefault(id(stored_weight(module)), []).append(name)
    yield from (group for group in owners.values() if len(group) > 1)


def _named(
    model: nn.Module, shared: Sequence[Sequence[str]], order: dict[str, int]
) -> Iterator[list[str]]:
    for targets in shared:
        group = []
        for target in targets:
            found = [name for name, _ in match_named_modules(model, [target]) if name in order]
            if not found:
                raise RecipeError(f"shared_layers: `{target}` is none of the layers to choose for")
            group += found
        yield group


def _common_name(names: list[str]) -> str:
    """:return: ``layers.0.self_attn.{q_proj,k_proj}``; of many, how many"""
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    depth = 0
    while all(len(parts) > depth + 1 and parts[depth] == split[0][depth] for parts in split):
        depth += 1
    prefix = "".join(f"{part}." for part in split[0][:depth])
    rest = [".".join(parts[depth:]) for parts in split]
    return prefix + ("{" + ",".join(rest) + "}" if len(rest) <= 4 else f"({len(rest)} layers)")


def _targets(layers: list[str], every: list[str]) -> tuple[str, ...]:
    """
    :param every: names of all modules of the model
    :return: patterns for the experts of a block, if they match no other module, else the names
    """
    # From `layers` on: engines may know the model under another prefix.
    from_layers = [re.sub(r"^.*?\.(?=layers\.)", "", name) for name in layers]
    for prefix, names in ((r".*\.", from_layers), ("^", layers)):
        patterns = {re.sub(r"(?<=\bexperts\\\.)\d+", "[0-9]+", re.escape(x)) for x in names}
        if len(patterns) == len(layers):
            break
        targets = [f"{prefix}{pattern}$" for pattern in sorted(patterns)]
        if {name for name in every if re.match("|".join(targets), name)} == set(layers):
            return tuple(f"re:{target}" for target in targets)
    return tuple(layers)
