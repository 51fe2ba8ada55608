"""Layers as kernels see them: which are alike, and which are multiplied as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoround_modifier.engines.fused import fused_parts
from autoround_modifier.engines.name_expressions import NUMBER
from autoround_modifier.engines.scheme import Scheme

__all__ = ["AlikeLayers", "ShapedLayer", "alike_layers", "fused_layers"]


@dataclass(frozen=True)
class ShapedLayer:
    """
    A quantized layer.

    :param name: as in the files
    :param scheme: of it
    :param out_features: rows of its weight
    :param in_features: columns of its weight
    :param experts: whether it belongs to an expert of a mixture
    :param copies: layers that it stands for
    """

    name: str
    scheme: Scheme
    out_features: int
    in_features: int
    experts: bool = False
    copies: int = 1


@dataclass(frozen=True)
class AlikeLayers:
    """
    Layers of one scheme and shape.

    :param scheme: of them
    :param experts: whether they belong to experts of a mixture
    :param shape: output and input features; None if they are not known
    :param names: of them, with ``*`` for numbers
    :param number: how many there are
    """

    scheme: Scheme
    experts: bool = False
    shape: tuple[int, int] | None = None
    names: tuple[str, ...] = ()
    number: int = 1


def alike_layers(layers: Iterable[ShapedLayer]) -> tuple[AlikeLayers, ...]:
    """:return: layers by scheme and shape, in the order of the schemes' labels"""
    found: dict[tuple[Scheme, bool, tuple[int, int]], list[ShapedLayer]] = {}
    for layer in layers:
        shape = (layer.out_features, layer.in_features)
        found.setdefault((layer.scheme, layer.experts, shape), []).append(layer)
    return tuple(
        AlikeLayers(
            *key,
            tuple(dict.fromkeys(NUMBER.sub("*", x.name) for x in alike)),
            sum(x.copies for x in alike),
        )
        for key, alike in sorted(found.items(), key=lambda x: (x[0][0].label, x[0][1:]))
    )


def fused_layers(layers: Sequence[ShapedLayer]) -> list[ShapedLayer]:
    """
    :return: layers as vLLM and SGLang multiply by them: of those that they fuse, one with the
        output features of all. Experts are not fused here; neither are layers of several schemes,
        which are refused elsewhere
    """
    dense = {layer.name: layer for layer in layers if not layer.experts}
    result = [layer for layer in layers if layer.experts]
    for fused, names in fused_parts(dense):
        parts = [dense[name] for name in names if name in dense]
        first = parts[0] if parts else None
        if first is None or any(
            (x.scheme, x.in_features, x.copies) != (first.scheme, first.in_features, first.copies)
            for x in parts
        ):
            continue
        rows = sum(x.out_features for x in parts)
        result.append(
            ShapedLayer(fused, first.scheme, rows, first.in_features, False, first.copies)
        )
        for part in parts:
            del dense[part.name]
    return [*dense.values(), *result]
