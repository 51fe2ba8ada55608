"""Whether formats can hold what will be saved, found out from names, shapes and schemes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedModel

from autoround_modifier.checkpoints.saved_layers import tensor_bytes
from autoround_modifier.errors import ExportError, listed
from autoround_modifier.exports.export_formats import (
    AUTO,
    FORMATS,
    GGUF,
    check_format,
    find_format,
    layer_problems,
    problems_of,
    refuse,
)
from autoround_modifier.exports.integer_specs import (
    FOR_GGUF,
    IntegerSpec,
    check_integers,
    family_of,
    integer_spec,
    unquantized_layers,
)
from autoround_modifier.host.prediction import predict_layers
from autoround_modifier.host.schemes import QuantizationConfig

__all__ = ["PredictedFloats", "PredictedLayers", "check_predicted", "predict_specs"]


@dataclass(frozen=True)
class PredictedFloats:
    """
    :ivar numbers: ``mxfp4`` or ``nvfp4``
    :ivar shape: (out_features, in_features)
    """

    numbers: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class PredictedLayers:
    """
    :ivar specs: of the layers that are quantized to integers
    :ivar floats: the other quantized layers, by name
    :ivar skipped: layers that are not quantized
    :ivar others: bytes of all tensors that are no part of a quantized layer's weight
    """

    specs: tuple[IntegerSpec, ...]
    floats: dict[str, PredictedFloats]
    skipped: tuple[str, ...]
    others: int


def predict_specs(
    model: PreTrainedModel, configs: Iterable[QuantizationConfig], what: str
) -> PredictedLayers:
    """
    :param model: not compressed; it is not changed
    :param configs: of the modifiers that will quantize it, in their order
    :param what: is checked, for the message
    :raises ExportError: if anything is quantized that no format holds
    """
    layout, layers = predict_layers(model, configs)
    schemes = {name: layer.scheme for name, layer in layers.items()}
    check_integers(what, layout, schemes, FOR_GGUF)
    families = {name: family_of(scheme) for name, scheme in schemes.items()}
    floats = {
        name: PredictedFloats(family.removesuffix("a16"), layers[name].shape)
        for name, family in families.items()
        if family in FOR_GGUF
    }
    specs = tuple(
        integer_spec(name, layer.shape, cast(Any, layer.scheme.weights))
        for name, layer in layers.items()
        if name not in floats
    )
    others = sum(
        tensor_bytes(tensor)
        for name, tensor in layout.tensors.items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    )
    skipped = tuple(unquantized_layers(layout.tensors, layers))
    return PredictedLayers(specs, floats, skipped, others)


def check_predicted(name: str, layers: PredictedLayers) -> None:
    """
    :param name: of a format
    :param layers: that will be saved
    :raises ExportError: if there is no such format, or it cannot hold them
    """
    chosen = find_format(name)
    if chosen.name.startswith(GGUF):
        _check_gguf(chosen.name.removeprefix(GGUF), layers)
        return
    if layers.floats:
        numbers = ", ".join(sorted({x.numbers.upper() for x in layers.floats.values()}))
        raise ExportError(
            f"`{chosen.name}` holds integers alone, and {numbers} is in GGUF (`gguf:auto`): "
            f"{listed(list(layers.floats))}"
        )
    check_format(chosen, layers.specs, layers.skipped)


def _check_gguf(kind: str, layers: PredictedLayers) -> None:
    """Layers that the named type does not hold get another, but one must be held."""
    types = [x for x in FORMATS.values() if x.name.startswith(GGUF) and x.name != f"{GGUF}{AUTO}"]
    chosen = FORMATS[f"{GGUF}{kind}"]
    without = [spec for spec in layers.specs if all(any(layer_problems(x, spec)) for x in types)]
    held = kind == AUTO or kind in {floats.numbers for floats in layers.floats.values()}
    held = held or any(not any(layer_problems(chosen, spec)) for spec in layers.specs)
    if without or not held:
        _refuse(kind, without or layers.specs, layers)


def _refuse(kind: str, specs: Sequence[IntegerSpec], layers: PredictedLayers) -> None:
    """:raises ExportError: always"""
    shown = FORMATS[f"{GGUF}{'q8_0' if kind == AUTO else kind}"]
    problems: dict[str, list[str]] = {}
    for spec in specs:
        for reason in layer_problems(shown, spec):
            problems.setdefault(reason, []).append(spec.name)
    for name, floats in layers.floats.items():
        reason = f"{floats.numbers.upper()}: {GGUF}{floats.numbers} alone holds it"
        problems.setdefault(reason, []).append(name)
    refuse(
        FORMATS[f"{GGUF}{kind}"],
        problems,
        lambda other: not layers.floats and not problems_of(other, layers.specs, layers.skipped),
    )
