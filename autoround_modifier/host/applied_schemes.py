"""Schemes that a model has already: of an earlier run, or of one that stopped half way."""

from __future__ import annotations

from collections.abc import Container, Iterable
from weakref import WeakSet

from compressed_tensors.quantization import QuantizationMetadata, QuantizationStatus
from torch import nn

from autoround_modifier.host.lifecycle import Modifier, QuantizationMixin, disable_quantization
from autoround_modifier.host.matching import match_named_modules

__all__ = [
    "disable_unfinished",
    "forget_carriers",
    "forget_scheme",
    "forget_schemes",
    "modules_of",
    "quantized_names",
]


# Layers that are quantized although they have no scheme
_DENSE: WeakSet[nn.Module] = WeakSet()


def quantized_names(model: nn.Module) -> list[str]:
    """
    :return: names of the modules that were quantized, or began to be, before this run: all
        modifiers of a recipe are initialised before the first of them calibrates
    """
    return [
        name
        for name, x in model.named_modules()
        if _status(x) > QuantizationStatus.INITIALIZED or x in _DENSE
    ]


def modules_of(model: nn.Module, modifiers: Iterable[Modifier]) -> set[nn.Module]:
    """:return: the modules that these modifiers give a scheme"""
    return {
        module
        for modifier in modifiers
        if isinstance(modifier, QuantizationMixin)
        for _, module in match_named_modules(model, modifier.resolved_targets, modifier.ignore)
    }


def forget_schemes(model: nn.Module, keep: Container[nn.Module]) -> None:
    """Remove schemes under which nothing was quantized, left by a run that stopped early."""
    for module in model.modules():
        if module not in keep and hasattr(module, "quantization_scheme"):
            forget_scheme(module)


def forget_scheme(module: nn.Module) -> None:
    """Make a module what it was before it was given a scheme."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        QuantizationMetadata.clear_quantization(module)
    else:  # attention, whose forward was never wrapped
        QuantizationMetadata.clear_all_qparams(module)
        module.__dict__.pop("quantization_scheme", None)
    module.__dict__.pop("quantization_status", None)


def forget_carriers(layers: Iterable[nn.Module]) -> None:
    """
    Remove schemes that compressed-tensors is not to save, of layers that are quantized in another
    way and now compute with their dequantized weights.
    """
    for layer in layers:
        forget_scheme(layer)
        _DENSE.add(layer)


def disable_unfinished(model: nn.Module) -> None:
    """Let modules whose scales were never found compute without them."""
    for module in model.modules():
        if _status(module) < QuantizationStatus.FROZEN:
            disable_quantization(module)


def _status(module: nn.Module) -> QuantizationStatus:
    status = getattr(module, "quantization_status", None)
    return QuantizationStatus.INITIALIZED if status is None else status
