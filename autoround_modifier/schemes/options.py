"""The schemes a layer can get, by the names that recipes use or spelled out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoround_modifier.errors import SchemeError
from autoround_modifier.host.schemes import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    is_preset_scheme,
    preset_name_to_scheme,
    scheme_names,
)
from autoround_modifier.scheme_names import SCHEME_NAME, did_you_mean

__all__ = ["named_scheme", "resolve_options"]

_EXPLAINED = (
    "a preset of compressed-tensors (" + ", ".join(scheme_names()) + "), integer weights also with "
    "zero points and another group size, as in W2A16G64 or W4A16_ASYM_G32"
)


def named_scheme(name: str) -> QuantizationScheme:
    """
    :param name: ``<preset>[_ASYM][G<group size>]``, in any case
    :return: the scheme, without targets
    :raises SchemeError: if there is no such scheme
    """
    if is_preset_scheme(name):
        return preset_name_to_scheme(name, targets=[])
    match = SCHEME_NAME.fullmatch(name)
    if match is None or not is_preset_scheme(match["preset"]):
        raise SchemeError(f"unknown scheme `{name}`{did_you_mean(name)}; use {_EXPLAINED}")
    scheme = preset_name_to_scheme(match["preset"], targets=[])
    if scheme.weights is None or scheme.weights.type != QuantizationType.INT:
        raise SchemeError(f"`{name}`: {match['preset']} has no group size or zero points to choose")
    fields: dict[str, Any] = {}
    if match["asymmetric"]:
        fields["symmetric"] = False
    if match["group_size"]:
        fields |= {"strategy": QuantizationStrategy.GROUP, "group_size": int(match["group_size"])}
    # Built again, so that the fields are checked against each other.
    weights = QuantizationArgs(**{**scheme.weights.model_dump(exclude_unset=True), **fields})
    return scheme.model_copy(update={"weights": weights})


def resolve_options(options: list[Any]) -> dict[str, QuantizationScheme]:
    """
    :param options: names for `named_scheme`, or mappings with the fields of `QuantizationScheme`,
        of which ``name`` may be one
    :return: schemes by name, in the order given
    :raises SchemeError: if one is unknown, two have one name, or there are fewer than two
    """
    schemes: dict[str, QuantizationScheme] = {}
    for option in options:
        if isinstance(option, str):
            name, scheme = option.upper(), named_scheme(option)
        elif isinstance(option, Mapping):
            fields = dict(option)
            name = str(fields.pop("name", None) or f"option_{len(schemes)}")
            scheme = QuantizationScheme(**{"targets": [], **fields})
        else:
            raise SchemeError(f"`{option}` is neither the name of a scheme nor a mapping of fields")
        if name in schemes:
            raise SchemeError(f"options: `{name}` is listed twice")
        schemes[name] = scheme
    if len(schemes) < 2:
        raise SchemeError("options: there is nothing to choose from; name two schemes or more")
    return schemes
