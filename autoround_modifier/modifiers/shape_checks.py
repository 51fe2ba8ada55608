"""What modifiers refuse as they start, found out from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loguru import logger
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from autoround_modifier.checkpoints.check import check_before_saving
from autoround_modifier.errors import ExportError, RecipeError
from autoround_modifier.exports.export_formats import AUTO, GGUF
from autoround_modifier.exports.predicted import (
    PredictedLayers,
    check_predicted,
    predict_specs,
)
from autoround_modifier.gguf_schemes import gguf_scheme
from autoround_modifier.host.blocks import find_blocks
from autoround_modifier.host.empty_model import empty_model
from autoround_modifier.host.lifecycle import Modifier, quantization_configs
from autoround_modifier.host.saved_names import name_experts_as_released
from autoround_modifier.host.schemes import QuantizationConfig
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.auto_scheme import AutoSchemeModifier
from autoround_modifier.modifiers.gguf_layers import check_alone, choose_gguf_types, saved_configs
from autoround_modifier.modifiers.routers import ignored_layers
from autoround_modifier.modifiers.validation import (
    check_fit,
    check_kv_cache,
    check_layers_in_blocks,
    layers_to_choose_for,
    resolve_schemes,
)
from autoround_modifier.schemes import check_budget, resolve_options

__all__ = ["check_formats", "check_shapes", "checked_exports"]


def check_shapes(
    config: PreTrainedConfig,
    modifiers: Sequence[Modifier],
    trust_remote_code: bool = False,
    formats: Sequence[str] = (),
) -> None:
    """
    :param config: of the model that is to be quantized
    :param modifiers: of a recipe, made for this check alone: they are changed
    :param trust_remote_code: let the model run its own code
    :param formats: to which the checkpoint will be exported
    :raises RecipeError: if Transformers cannot build the model, nothing is targeted, no block is
        found, or an engine would not load what will be saved
    :raises SchemeError: if a scheme does not fit a layer, or no choice fits a budget of bits
    :raises ExportError: if a format cannot hold what will be saved
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
    if tuners and all(x.has_schemes for x in tuners):
        check_before_saving(model, saved_configs(modifiers), tuners[-1].engine)
    checked_exports(model, modifiers, formats)


def check_formats(
    config: PreTrainedConfig,
    modifiers: Sequence[Modifier],
    formats: Sequence[str],
    trust_remote_code: bool = False,
) -> None:
    """
    The last of `check_shapes`. A model that Transformers cannot build from its configuration alone
    is not checked, with a warning.

    :raises ExportError: if a format cannot hold what will be saved
    """
    if not formats:
        return
    try:
        model = empty_model(config, trust_remote_code=trust_remote_code, all_experts=True).model
    except RecipeError as error:
        logger.warning(f"formats are not checked before the run: {error}")
        return
    checked_exports(model, modifiers, formats)


def _predicted_layers(model: PreTrainedModel, modifiers: Sequence[Modifier]) -> PredictedLayers:
    """
    :param model: made of its configuration
    :param modifiers: of a recipe
    :return: what will be saved. Where schemes are still to be chosen, each layer with each option
    :raises ExportError: if nothing is quantized, or something that no format holds
    """
    name_experts_as_released(model)
    choosers = [x for x in modifiers if isinstance(x, AutoSchemeModifier)]
    tuners = [x for x in modifiers if isinstance(x, AutoRoundModifier)]
    for tuner in tuners:
        if tuner.has_schemes:
            tuner.add_ignored(ignored_layers(model, tuner.resolved_config))
    fixed = quantization_configs(modifiers)
    ignore = [name for x in choosers for name in x.ignore]
    ignore += [name for x in tuners for name in x.ignore]
    options = [config for x in choosers for config in _option_configs(model, x, ignore)]
    found = [
        predict_specs(model, fixed if option is None else [*fixed, option], "this recipe")
        for option in options or [None]
    ]
    specs = tuple(dict.fromkeys(spec for one in found for spec in one.specs))
    floats = {name: layer for one in found for name, layer in one.floats.items()}
    if not specs and not floats:
        raise ExportError("this recipe quantizes no weights, so nothing can be exported")
    return replace(found[-1], specs=specs, floats=floats)


def checked_exports(
    model: PreTrainedModel, modifiers: Sequence[Modifier], formats: Sequence[str]
) -> dict[str, PredictedLayers]:
    """
    :param model: made of its configuration
    :param modifiers: of a recipe, made for this check alone: they are changed
    :return: format -> what it will hold; without formats that need no check, as those in which a
        recipe tunes
    :raises ExportError: if a format cannot hold what will be saved
    """
    left = _formats_left_to_check(modifiers, formats)
    if not left:
        return {}
    layers = _predicted_layers(model, modifiers)
    for name in left:
        check_predicted(name, layers)
    return dict.fromkeys(left, layers)


def _formats_left_to_check(modifiers: Sequence[Modifier], formats: Sequence[str]) -> list[str]:
    """
    What is tuned in a scheme of GGUF is written as that, and as nothing else.

    :return: formats that hold or do not hold what other schemes make
    :raises ExportError: if a recipe with such a scheme is to be written in another format, or one
        without in such a scheme
    """
    tuners = [x for x in modifiers if isinstance(x, AutoRoundModifier)]
    tuned = next((x.gguf_scheme for x in tuners if x.gguf_scheme is not None), None)
    if tuned is None:
        wanted = [name for name in formats if gguf_scheme(name) is not None]
        if wanted:
            raise ExportError(
                f"`{wanted[0]}` is tuned in the format: write `scheme: {wanted[0]}` "
                f"(`--scheme {wanted[0]}`). `gguf:auto` holds integers of other schemes as they are"
            )
        return list(formats)
    others = [name for name in formats if name not in (tuned, f"{GGUF}{AUTO}")]
    if others:
        raise ExportError(
            f"what is tuned in `{tuned}` cannot be written as {', '.join(others)}; leave the "
            f"format to {tuned}"
        )
    return []


def _option_configs(
    model: nn.Module, modifier: AutoSchemeModifier, ignore: list[str]
) -> list[QuantizationConfig]:
    """:return: for each option that quantizes: all targeted layers get it"""
    targets = [modifier.targets] if isinstance(modifier.targets, str) else list(modifier.targets)
    configs = []
    for scheme in resolve_options(modifier.options).values():
        if scheme.weights is None:
            continue
        group = scheme.model_copy(update={"targets": targets}, deep=True)
        config = QuantizationConfig(config_groups={"group_0": group}, ignore=ignore)
        config.ignore = [*ignore, *ignored_layers(model, config)]
        configs.append(config)
    return configs


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
