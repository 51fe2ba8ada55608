"""Which layers are quantized to integers, and how, as far as names, shapes and schemes tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass

from autoround_modifier.checkpoints.saved_config import QUANTIZED_CACHE, beside_weights
from autoround_modifier.checkpoints.saved_layers import EMBEDDINGS, HEADS
from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.engines.layout import CheckpointLayout, TensorLayout
from autoround_modifier.engines.scheme import Scheme
from autoround_modifier.errors import ExportError, listed
from autoround_modifier.host.schemes import QuantizationArgs, QuantizationScheme, QuantizationType

__all__ = [
    "EXPERTS",
    "FOR_GGUF",
    "IntegerSpec",
    "check_integers",
    "family_of",
    "integer_spec",
    "kind_of",
    "unquantized_layers",
]

# Families of `Scheme` that GGUF holds as well: weights alone are quantized, to 4 bits
FOR_GGUF = ("mxfp4a16", "nvfp4a16")
# Name of a module that holds experts, and what is in it: layers, or tensors of all of them
EXPERTS = "experts"
_INSIDE_EXPERTS = re.compile(rf"((?:.*\.)?{EXPERTS})\.")


@dataclass(frozen=True)
class IntegerSpec:
    """
    :ivar name: of a quantized layer, as in the files
    :ivar out_features: rows of its weight
    :ivar in_features: columns of its weight
    :ivar num_bits: of an integer
    :ivar symmetric: whether it has no zero points
    :ivar group_size: input features that share a scale; -1 where a whole row does
    :ivar kind: ``linear``, ``expert``, ``embedding`` or ``head``
    """

    name: str
    out_features: int
    in_features: int
    num_bits: int
    symmetric: bool
    group_size: int
    kind: str

    @property
    def label(self) -> str:
        """Such as ``W2A16 G64`` or ``W8A16 asym channel``."""
        strategy = "channel" if self.group_size == -1 else "group"
        return Scheme("int", self.num_bits, self.symmetric, self.group_size, strategy).label

    @property
    def features_per_scale(self) -> int:
        return self.in_features if self.group_size == -1 else self.group_size


def integer_spec(name: str, shape: Iterable[int], weights: QuantizationArgs) -> IntegerSpec:
    """
    :param name: of a layer, as in the files
    :param shape: (out_features, in_features)
    :param weights: how its weight is quantized, to integers
    """
    rows, columns = shape
    by_group = str(getattr(weights.strategy, "value", weights.strategy)) == "group"
    return IntegerSpec(
        name=name,
        out_features=rows,
        in_features=columns,
        num_bits=weights.num_bits,
        symmetric=bool(weights.symmetric),
        group_size=int(weights.group_size or -1) if by_group else -1,
        kind=kind_of(name),
    )


def kind_of(name: str) -> str:
    """
    :param name: of a layer
    :return: ``linear``, ``expert``, ``embedding`` or ``head``
    """
    if EXPERT.search(name):
        return "expert"
    if EMBEDDINGS.fullmatch(name):
        return "embedding"
    return "head" if name.rpartition(".")[2] in HEADS else "linear"


def unquantized_layers(tensors: Mapping[str, TensorLayout], quantized: Container[str]) -> list[str]:
    """
    :param tensors: of a checkpoint
    :param quantized: names of the quantized layers
    :return: names of the layers with a matrix for weight that are not quantized, embeddings left
        out; for experts that of the module that holds them, by which engines know them
    """
    found: dict[str, None] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        inside = _INSIDE_EXPERTS.match(name)
        if layer in quantized:
            continue
        if inside is not None:
            found[inside[1]] = None
        elif part == "weight" and len(tensor.shape) == 2 and not EMBEDDINGS.fullmatch(layer):
            found[layer] = None
    return list(found)


def check_integers(
    what: str,
    layout: CheckpointLayout,
    schemes: Mapping[str, QuantizationScheme],
    floats: Collection[str] = (),
) -> None:
    """
    :param what: is checked, for the message
    :param layout: of a checkpoint
    :param schemes: of its quantized layers, by their names in the files
    :param floats: families of `Scheme` that the format holds as well
    :raises ExportError: if anything is quantized that is not the weight of a layer, to integers or
        one of ``floats``
    """
    found: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        reason = _not_integers(name, scheme, layout.tensors, floats)
        if reason is not None:
            found.setdefault(reason, []).append(name)
    found |= {reason: [field] for reason, field in beside_weights(layout.quantization).items()}
    caches = [name for name in layout.tensors if name.endswith((".k_scale", ".v_scale"))]
    if caches:
        found[QUANTIZED_CACHE] = caches
    if found:
        reasons = [f"{reason}: {listed(names)}" for reason, names in found.items()]
        raise ExportError(
            f"{what} is more than integers of weights, which alone can be exported to this format; "
            "it can stay in compressed-tensors.\n  " + "\n  ".join(reasons)
        )


def _not_integers(
    name: str,
    scheme: QuantizationScheme,
    tensors: Mapping[str, TensorLayout],
    floats: Collection[str],
) -> str | None:
    assert scheme.weights is not None
    family = family_of(scheme)
    if family in floats:
        return None
    if scheme.weights.type != QuantizationType.INT:
        elsewhere = "; GGUF holds it (`gguf:auto`)" if family in FOR_GGUF else ""
        return f"{_label(scheme)} is no integer format{elsewhere}"
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return f"{_label(scheme)} quantizes activations"
    if f"{name}.weight_g_idx" in tensors:
        return "columns are in the order of their activations (`actorder`)"
    return None


def family_of(scheme: QuantizationScheme) -> str:
    """:return: one of `FAMILIES`; ``other`` for what has no name"""
    found = Scheme.of_group(scheme.model_dump(mode="json"))
    return "other" if found is None else found.family


def _label(scheme: QuantizationScheme) -> str:
    """:return: such as ``W8A8 sym channel dynamic`` or ``NVFP4``"""
    found = Scheme.of_group(scheme.model_dump(mode="json"))
    return "weights" if found is None else found.label
