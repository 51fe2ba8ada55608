"""What of a quantized model can be trained end to end."""

from __future__ import annotations

from torch import nn

from autoround_modifier.errors import RecipeError, SchemeError, listed
from autoround_modifier.host.activations import has_quantized_cache
from autoround_modifier.host.layers import disable_onloading
from autoround_modifier.host.schemes import (
    QuantizationArgs,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)

__all__ = ["trainable_layers", "trainable_norms"]

STRATEGIES = (
    QuantizationStrategy.GROUP,
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.TENSOR,
)


def trainable_layers(model: nn.Module) -> dict[nn.Linear, QuantizationArgs]:
    """
    :return: quantized linear layers, without the embeddings, and how their weights are quantized
    :raises RecipeError: if there is none, or saving has compressed the model
    :raises SchemeError: naming the layers whose scales have a fixed grid, or whose activations are
        quantized
    """
    layers: dict[nn.Linear, QuantizationArgs] = {}
    unsupported, compressed = [], []
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and has_quantized_cache(module):
            unsupported.append(f"{name} (its key-value cache)")
        if scheme is None or scheme.weights is None or not isinstance(module, nn.Linear):
            continue
        if getattr(module, "quantization_status", None) == QuantizationStatus.COMPRESSED:
            compressed.append(name)
        args = scheme.weights
        if (
            args.type != QuantizationType.INT
            or args.strategy not in STRATEGIES
            or scheme.input_activations is not None
            or scheme.output_activations is not None
        ):
            unsupported.append(name)
        layers[module] = args
    if compressed:
        raise RecipeError(
            "saving has compressed the weights of these layers, so their scales cannot be trained: "
            f"{listed(compressed)}. Distil before saving, or load the checkpoint again."
        )
    if unsupported:
        raise SchemeError(
            "Scale distillation trains scales of integer weights by group, channel or "
            "tensor, without quantized activations or cache. These layers have another scheme: "
            f"{listed(unsupported)}"
        )
    if not layers:
        raise RecipeError(
            "scale distillation found no linear layer with a quantization scheme; quantize the "
            "model first (in a recipe: put ScaleDistillationModifier after the modifier that does)"
        )
    return layers


def trainable_norms(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """:return: gains and biases: parameters with one dimension named ``weight`` or ``bias``"""
    found = []
    seen: set[int] = set()
    with disable_onloading():  # only shapes are asked for
        for module in model.modules():
            for name in ("weight", "bias"):
                value = getattr(module, name, None)
                if not isinstance(value, nn.Parameter) or id(value) in seen:
                    continue
                seen.add(id(value))
                if value.ndim == 1 and value.is_floating_point():
                    found.append((module, name))
    return found
