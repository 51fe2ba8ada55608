"""Layers summed up by kind and by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median

from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.report.schema import LayerRecord, QuantizationReport

__all__ = [
    "ExpertTokens",
    "Grid",
    "KindRow",
    "bits_by_block",
    "by_kind",
    "bytes_by_kind",
    "expert_tokens",
    "grid_of",
    "layer_bytes",
    "scheme_grid",
    "schemes_by_bits",
    "unquantized_bytes",
]


@dataclass(frozen=True)
class KindRow:
    """
    Layers of one kind whose error is measured in one way. Errors are means over layers.

    :param schemes: short names, by number of layers
    :param moved: share of the weights that moved
    """

    kind: str
    layers: int
    weights: int
    bytes: float
    bits: float
    schemes: str
    error_of: str
    initial_error: float | None
    error: float | None
    moved: float


@dataclass(frozen=True)
class Grid:
    """
    A value for each kind of layer and each block.

    :param values: (kinds, blocks); None where there is no such layer
    """

    kinds: list[str]
    blocks: list[int]
    values: list[list[float | None]]

    @property
    def present(self) -> list[float]:
        return [x for row in self.values for x in row if x is not None]


@dataclass(frozen=True)
class ExpertTokens:
    """Calibration tokens that the experts of one block received."""

    block: int
    experts: int
    least: int
    middle: float
    most: int
    without: int


def layer_bytes(layer: LayerRecord) -> float:
    return layer.bits_per_weight * layer.weights / 8


def bytes_by_kind(layers: Iterable[LayerRecord]) -> dict[str, tuple[float, float]]:
    """:return: kind -> bytes as saved and bits for each weight, as kinds first appear"""
    size: dict[str, float] = {}
    weights: dict[str, int] = {}
    for layer in layers:
        size[layer.kind] = size.get(layer.kind, 0.0) + layer_bytes(layer)
        weights[layer.kind] = weights.get(layer.kind, 0) + layer.weights
    return {kind: (size[kind], 8 * size[kind] / max(weights[kind], 1)) for kind in size}


def bits_by_block(layers: Iterable[LayerRecord]) -> dict[int, float]:
    """:return: block -> bits for each of its weights, ascending"""
    blocks: dict[int, list[LayerRecord]] = {}
    for layer in layers:
        if layer.block is not None:
            blocks.setdefault(layer.block, []).append(layer)
    return {
        block: 8 * sum(map(layer_bytes, group)) / max(sum(x.weights for x in group), 1)
        for block, group in sorted(blocks.items())
    }


def by_kind(layers: Iterable[LayerRecord]) -> list[KindRow]:
    """:return: in the order in which kinds first appear"""
    groups: dict[tuple[str, str], list[LayerRecord]] = {}
    for layer in layers:
        groups.setdefault((layer.kind, layer.error_of), []).append(layer)
    rows = []
    for (kind, error_of), group in groups.items():
        weights = sum(x.weights for x in group)
        size = sum(map(layer_bytes, group))
        initial = [x.initial_error for x in group if x.initial_error is not None]
        errors = [x.error for x in group if x.error is not None]
        schemes = [x.scheme for x in group]
        names = sorted(set(schemes), key=lambda name: (-schemes.count(name), name))
        rows.append(
            KindRow(
                kind=kind,
                layers=len(group),
                weights=weights,
                bytes=size,
                bits=8 * size / weights if weights else 0.0,
                schemes=", ".join(names),
                error_of=error_of,
                initial_error=fmean(initial) if initial else None,
                error=fmean(errors) if errors else None,
                moved=sum(x.moved for x in group) / weights if weights else 0.0,
            )
        )
    return rows


def grid_of(layers: Iterable[LayerRecord], value: Callable[[LayerRecord], float | None]) -> Grid:
    """
    :param layers: those outside of blocks, and those without a value, are left out
    :param value: the mean of it is taken where a block has several layers of a kind
    """
    cells: dict[tuple[str, int], list[float]] = {}
    for layer in layers:
        number = value(layer)
        if layer.block is not None and number is not None:
            cells.setdefault((layer.kind, layer.block), []).append(number)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    values = [
        [fmean(cells[kind, block]) if (kind, block) in cells else None for block in blocks]
        for kind in kinds
    ]
    return Grid(kinds, blocks, values)


def schemes_by_bits(layers: Iterable[LayerRecord]) -> list[str]:
    """:return: short names, that of the fewest bits first"""
    bits: dict[str, float] = {}
    for layer in layers:
        bits[layer.scheme] = min(layer.bits_per_weight, bits.get(layer.scheme, math.inf))
    return sorted(bits, key=lambda name: (bits[name], name))


def scheme_grid(layers: list[LayerRecord]) -> Grid:
    """:return: index in `schemes_by_bits` of each layer; the largest where a cell has several"""
    index = {name: number for number, name in enumerate(schemes_by_bits(layers))}
    largest: dict[tuple[str, int | None], int] = {}
    for layer in layers:
        key = (layer.kind, layer.block)
        largest[key] = max(index[layer.scheme], largest.get(key, 0))
    return grid_of(layers, lambda x: largest[x.kind, x.block])


def expert_tokens(layers: Iterable[LayerRecord]) -> list[ExpertTokens]:
    """:return: by block; empty if no layer is an expert's"""
    blocks: dict[int, dict[str, int]] = {}
    for layer in layers:
        if layer.tokens is not None and layer.block is not None:
            match = EXPERT.search(layer.name)
            expert = layer.name[: match.end()] if match else layer.name
            blocks.setdefault(layer.block, {})[expert] = layer.tokens
    return [
        ExpertTokens(
            block=block,
            experts=len(tokens),
            least=min(tokens.values()),
            middle=median(tokens.values()),
            most=max(tokens.values()),
            without=sum(not x for x in tokens.values()),
        )
        for block, tokens in sorted(blocks.items())
    ]


def unquantized_bytes(report: QuantizationReport) -> float | None:
    """:return: of the checkpoint, what quantized layers do not account for; None if not saved"""
    if report.size is None:
        return None
    return max(report.size.saved_bytes - sum(map(layer_bytes, report.layers)), 0.0)
