"""To which formats layers can be exported, from their schemes and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from autoround_modifier.engines.layers import ShapedLayer
from autoround_modifier.engines.name_expressions import NUMBER
from autoround_modifier.errors import ExportError
from autoround_modifier.exports import export_formats
from autoround_modifier.exports.export_formats import FORMATS, GGUF, check_format
from autoround_modifier.exports.gguf_types import BLOCK_TYPES
from autoround_modifier.exports.integer_specs import FOR_GGUF, IntegerSpec, kind_of
from autoround_modifier.gguf_schemes import GGUF_SCHEMES

__all__ = ["export_problems"]

INTEGERS_ONLY = "integers of weights alone are exported"
AUTO = f"{GGUF}{export_formats.AUTO}"
# Families of schemes without integers that GGUF holds
GGUF_TYPES = {family: BLOCK_TYPES[family.removesuffix("a16")] for family in FOR_GGUF}


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
    if kv_cache:
        return dict.fromkeys(FORMATS, "a quantized key-value cache is not exported")
    alike = _one_of_each(layers)
    tuned_in = dict.fromkeys(x.scheme.format for x in alike if x.scheme.family == "gguf")
    names = (*FORMATS, *(name for name in GGUF_SCHEMES if name in tuned_in))
    found = {name: _problem(name, alike, unquantized) for name in names}
    if len({layer.scheme for layer in alike}) > 1:
        for name in FORMATS:
            if name.startswith(GGUF) and name != AUTO and found[name] is None:
                found[name] = f"{AUTO} takes fewer bits"
    return found


def _problem(format: str, layers: Sequence[ShapedLayer], unquantized: Sequence[str]) -> str | None:
    reasons = list(dict.fromkeys(x for layer in layers for x in _float_problems(format, layer)))
    specs = [_spec(layer) for layer in layers if layer.scheme.family == "int"]
    if specs and not reasons:
        try:
            check_format(FORMATS[format], specs, unquantized)
        except ExportError as error:
            # Each line below the first is a reason, and the layers.
            lines = str(error).splitlines()
            reasons = [line.strip().rpartition(": ")[0] for line in lines[1:]] or lines
    return "; ".join(reasons) or None


def _float_problems(format: str, layer: ShapedLayer) -> Iterator[str]:
    """Yield why a layer that has no integers, or quantized activations, cannot be exported."""
    family = layer.scheme.family
    if family == "gguf" and format == layer.scheme.format:
        return
    if family == "gguf" or format in GGUF_SCHEMES:
        yield f"{layer.scheme.label} is not what weights of {format} were tuned in"
        return
    if family == "int":
        return
    own = GGUF_TYPES.get(family)
    if own is None or format not in (f"{GGUF}{own.name}", AUTO):
        yield f"{INTEGERS_ONLY}, not {layer.scheme.label}"
    elif layer.in_features % own.block:
        yield f"{layer.in_features} input features, which must be a multiple of {own.block}"


def _one_of_each(layers: Iterable[ShapedLayer]) -> list[ShapedLayer]:
    """:return: of layers that differ in numbers in their names alone, the first"""
    found: dict[tuple[object, ...], ShapedLayer] = {}
    for layer in layers:
        alike = (NUMBER.sub("*", layer.name), layer.scheme, layer.out_features, layer.in_features)
        found.setdefault(alike, layer)
    return list(found.values())


def _spec(layer: ShapedLayer) -> IntegerSpec:
    return IntegerSpec(
        name=layer.name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        num_bits=layer.scheme.num_bits,
        symmetric=layer.scheme.symmetric,
        group_size=layer.scheme.group_size,
        kind="expert" if layer.experts else kind_of(layer.name),
    )
