"""To which formats layers can be exported, from their schemes and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autoround_modifier.checkpoints.saved_layers import EMBEDDINGS, HEADS
from autoround_modifier.engines.config_names import NUMBER
from autoround_modifier.engines.layers import ShapedLayer
from autoround_modifier.errors import ExportError
from autoround_modifier.exports.export_formats import FORMATS, check_format
from autoround_modifier.exports.integer_layers import IntegerSpec

__all__ = ["export_problems"]

INTEGERS_ONLY = "integers of weights alone are exported"


def export_problems(
    layers: Sequence[ShapedLayer], unquantized: Sequence[str], kv_cache: bool
) -> dict[str, str | None]:
    """
    Scales are not read, so a scale that is not exact in float16 is found by the export itself.

    :param layers: that are quantized
    :param unquantized: names of linear layers that are not
    :param kv_cache: whether the key-value cache is quantized
    :return: format -> why a checkpoint with these layers cannot be exported to it; None if it can
    """
    others = dict.fromkeys(x.scheme.label for x in layers if x.scheme.family != "int")
    if others or kv_cache:
        cache = ["a quantized key-value cache"] if kv_cache else []
        reason = f"{INTEGERS_ONLY}, not {', '.join([*others, *cache])}"
        return dict.fromkeys(FORMATS, reason)
    specs = [_spec(layer) for layer in _one_of_each(layers)]
    return {name: _problem(name, specs, unquantized) for name in FORMATS}


def _problem(format: str, specs: Sequence[IntegerSpec], unquantized: Sequence[str]) -> str | None:
    try:
        check_format(FORMATS[format], specs, unquantized)
    except ExportError as error:
        _, *reasons = str(error).splitlines()
        return "; ".join(reason.strip() for reason in reasons) or str(error)
    return None


def _one_of_each(layers: Iterable[ShapedLayer]) -> list[ShapedLayer]:
    """:return: of layers that differ in numbers in their names alone, the first"""
    found: dict[tuple[object, ...], ShapedLayer] = {}
    for layer in layers:
        alike = (NUMBER.sub("*", layer.name), layer.scheme, layer.out_features, layer.in_features)
        found.setdefault(alike, layer)
    return list(found.values())


def _spec(layer: ShapedLayer) -> IntegerSpec:
    kind = "linear"
    if layer.experts:
        kind = "expert"
    elif EMBEDDINGS.fullmatch(layer.name):
        kind = "embedding"
    elif layer.name.rpartition(".")[2] in HEADS:
        kind = "head"
    return IntegerSpec(
        name=layer.name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        num_bits=layer.scheme.num_bits,
        symmetric=layer.scheme.symmetric,
        group_size=layer.scheme.group_size,
        kind=kind,
    )
