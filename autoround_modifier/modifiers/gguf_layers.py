"""Which layer is tuned in which type of GGUF, and what cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast

from loguru import logger
from torch import nn
from transformers import PreTrainedConfig

from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.errors import RecipeError, SchemeError, listed
from autoround_modifier.exports.gguf_names import stacked
from autoround_modifier.fields import AutoSchemeFields, DistillationFields
from autoround_modifier.formats.super_block import SUPER_BLOCK
from autoround_modifier.gguf_schemes import (
    ModelFacts,
    fitting_type,
    layer_types,
)
from autoround_modifier.host.empty_model import NUM_EXPERTS
from autoround_modifier.host.layers import stored_weight
from autoround_modifier.host.lifecycle import Modifier, QuantizationMixin, quantization_configs
from autoround_modifier.host.schemes import QuantizationConfig
from autoround_modifier.modifiers.settings import SchemeSettings
from autoround_modifier.modifiers.validation import Schemes

__all__ = ["check_alone", "choose_gguf_types", "saved_configs", "say_what_falls_back"]

LLAMA_70B_LAYERS = 80
# Of latent attention; in mixtures llama.cpp's converter makes two tensors of it, one transposed
SPLIT = "kv_b_proj"


def check_alone(modifier: Modifier, modifiers: Iterable[Modifier]) -> None:
    """
    :param modifier: with a GGUF scheme
    :param modifiers: of the recipe
    :raises RecipeError: if another one quantizes as well, chooses schemes or trains scales
    """
    kinds = (QuantizationMixin, AutoSchemeFields, DistillationFields)
    others = [type(x).__name__ for x in modifiers if x is not modifier and isinstance(x, kinds)]
    if others:
        raise RecipeError(
            f"`scheme: {getattr(modifier, 'scheme', '')}` is saved as the blocks of a GGUF file, "
            f"beside which nothing else can be quantized: remove {listed(others)} from the recipe"
        )


def choose_gguf_types(
    model: nn.Module, scheme: str, targeted: Schemes, blocks: Mapping[nn.Module, str]
) -> dict[str, str]:
    """
    :param model: of Transformers; only its shapes are used
    :param scheme: a GGUF scheme
    :param targeted: the layers to tune
    :param blocks: decoder blocks and their names
    :return: layer -> name of its type, in the order of ``targeted``
    :raises SchemeError: naming every layer that cannot be tuned in such a type
    """
    inside = {
        f"{block}.{name}" if name else block: module
        for parent, block in blocks.items()
        for name, module in parent.named_modules()
        if isinstance(module, nn.Linear)
    }
    facts = _facts(model, inside)
    wanted = layer_types(scheme, list(inside), facts)
    stacks = (set(layers) for layers in stacked(inside).values())
    incomplete = {name for layers in stacks if layers - targeted.keys() for name in layers}
    types: dict[str, str] = {}
    refused: dict[str, list[str]] = {}
    for name, (layer, _) in targeted.items():
        columns = stored_weight(layer).shape[-1]
        reason, kind = None, None
        if name in incomplete:
            reason = "experts of a block are one tensor in GGUF, and others of it are left out"
        elif facts.experts > 1 and name.rpartition(".")[2] == SPLIT:
            reason = "llama.cpp's converter splits them and transposes a part"
        elif not isinstance(layer, nn.Linear) or name not in inside:
            reason = "outside of the decoder blocks; `export` writes embeddings and head"
        else:
            kind = fitting_type(wanted[name], columns)
            if kind is None:
                reason = f"{columns} input features, no multiple of 32, which all types need"
        if reason is not None:
            refused.setdefault(reason, []).append(name)
        elif kind is not None:
            types[name] = kind
    if refused:
        reasons = "; ".join(f"{reason}: {listed(names)}" for reason, names in refused.items())
        raise SchemeError(
            f"`scheme: {scheme}` cannot have these layers; add them to `ignore`. {reasons}"
        )
    return types


def say_what_falls_back(model: nn.Module, scheme: str, types: Mapping[str, str]) -> None:
    """
    Log the types, and which layers have another one than the scheme means because super-blocks of
    256 do not fit their rows.

    :param types: layer -> name of its type
    """
    counts = Counter(types.values())
    used = ", ".join(f"{kind.upper()} ({count})" for kind, count in counts.items())
    logger.info(f"{scheme}: the layers are tuned in {used}")
    fallen: dict[str, dict[str, int]] = {}
    for name, kind in types.items():
        columns = stored_weight(cast(nn.Linear, model.get_submodule(name))).shape[-1]
        if columns % SUPER_BLOCK:
            fallen.setdefault(kind, {})[name] = columns
    if fallen:
        parts = [
            f"{len(layers)} layers of {' or '.join(map(str, sorted(set(layers.values()))))} input "
            f"features in {kind.upper()} ({listed(list(layers))})"
            for kind, layers in fallen.items()
        ]
        logger.warning(
            f"super-blocks of {SUPER_BLOCK} do not divide the rows of some layers, which are tuned "
            f"in types of smaller blocks: {'; '.join(parts)}"
        )


def saved_configs(modifiers: Iterable[Modifier]) -> list[QuantizationConfig]:
    """
    :param modifiers: of a recipe
    :return: how they quantize what compressed-tensors saves: of a GGUF scheme nothing, since the
        weights beside its blocks are dequantized
    """
    modifiers = list(modifiers)
    if any(isinstance(x, SchemeSettings) and x.gguf_scheme is not None for x in modifiers):
        return []
    return quantization_configs(modifiers)


def _facts(model: nn.Module, names: Iterable[str]) -> ModelFacts:
    """:param names: of the layers in the decoder blocks"""
    config: Any = getattr(model, "config", None)
    found = (EXPERT.search(name) for name in names)
    experts = max((int(number[0]) + 1 for number in found if number), default=0)
    if not isinstance(config, PreTrainedConfig):
        return ModelFacts(experts=experts)
    text = config.get_text_config()
    numbers = (getattr(text, field, None) for field in NUM_EXPERTS)
    experts = next((x for x in numbers if isinstance(x, int)), experts)
    heads = getattr(text, "num_attention_heads", None)
    keys = getattr(text, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(keys, int):
        return ModelFacts(experts=experts)
    layers = getattr(text, "num_hidden_layers", 0)
    known = text.model_type in ("llama", "mistral", "qwen2")
    is_70b = known and layers == LLAMA_70B_LAYERS and heads != keys
    return ModelFacts(heads / keys, is_70b, experts)
