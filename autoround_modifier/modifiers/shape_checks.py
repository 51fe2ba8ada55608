"""What modifiers refuse as they start, found out from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence

from loguru import logger
from torch import nn
from transformers import PreTrainedConfig

from autoround_modifier.checkpoints.check import check_before_saving
from autoround_modifier.errors import RecipeError
from autoround_modifier.host.blocks import find_blocks
from autoround_modifier.host.empty_model import empty_model
from autoround_modifier.host.lifecycle import Modifier, quantization_configs
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.auto_scheme import AutoSchemeModifier
from autoround_modifier.modifiers.gguf_layers import check_alone, choose_gguf_types
from autoround_modifier.modifiers.routers import ignored_layers
from autoround_modifier.modifiers.validation import (
    check_fit,
    check_kv_cache,
    check_layers_in_blocks,
    layers_to_choose_for,
    resolve_schemes,
)
from autoround_modifier.schemes import check_budget, resolve_options

__all__ = ["check_shapes"]


def check_shapes(
    config: PreTrainedConfig, modifiers: Sequence[Modifier], trust_remote_code: bool = False
) -> None:
    """
    :param config: of the model that is to be quantized
    :param modifiers: of a recipe, made for this check alone: they are changed
    :param trust_remote_code: let the model run its own code
    :raises RecipeError: if Transformers cannot build the model, nothing is targeted, no block is
        found, or an engine would not load what will be saved
    :raises SchemeError: if a scheme does not fit a layer, or no choice fits a budget of bits
    """
    try:
        model = empty_model(config, trust_remote_code=trust_remote_code, all_experts=True).model
    except RecipeError as error:
        if not trust_remote_code:
            raise
        logger.warning(f"not checked before the model is loaded: {error}")
        return
    tuners = [x for x in modifiers if isinstance(x, AutoRoundModifier)]
    for modifier in modifiers:
        if isinstance(modifier, AutoSchemeModifier):
            _check_choice(model, modifier, tuners)
    for tuner in tuners:
        if not tuner.has_schemes:
            continue
        tuner.add_ignored(ignored_layers(model, tuner.resolved_config))
        tuner.set_gguf_types({})
        schemes = resolve_schemes(model, tuner.resolved_config)
        if tuner.gguf_scheme is not None:
            check_alone(tuner, modifiers)
            blocks = find_blocks(model, None)
            tuner.set_gguf_types(choose_gguf_types(model, tuner.gguf_scheme, schemes, blocks))
            schemes = resolve_schemes(model, tuner.resolved_config)
        check_fit(schemes)
        check_kv_cache(model, tuner.kv_cache_scheme)
        if tuner.iters:
            check_layers_in_blocks(find_blocks(model, None), schemes, tuner.iters)
    if tuners and all(x.has_schemes and x.gguf_scheme is None for x in tuners):
        check_before_saving(model, quantization_configs(modifiers), tuners[-1].engine)


def _check_choice(
    model: nn.Module, modifier: AutoSchemeModifier, tuners: Sequence[AutoRoundModifier]
) -> None:
    schemes = resolve_options(modifier.options)
    targets = [modifier.targets] if isinstance(modifier.targets, str) else modifier.targets
    ignore = [*modifier.ignore, *(name for tuner in tuners for name in tuner.ignore)]
    engine: str = modifier.engine or next((tuner.engine for tuner in tuners), "any")
    layers = layers_to_choose_for(model, schemes, targets, ignore)
    check_budget(
        model,
        layers,
        schemes,
        modifier.avg_bits,
        modifier.whole_model,
        modifier.shared_layers,
        engine,
    )
