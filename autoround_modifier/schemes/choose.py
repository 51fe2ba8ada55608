"""Chooses a scheme for each layer under a budget of bits: measure, keep the scores, solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn

from autoround_modifier.engines.check import required_engines, unreadable_experts
from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.errors import CalibrationError, SchemeError, listed
from autoround_modifier.host.layers import Layer, disable_onloading, stored_weight
from autoround_modifier.host.saved_format import saved_group
from autoround_modifier.host.saved_size import saved_bits
from autoround_modifier.host.schemes import QuantizationScheme
from autoround_modifier.schemes.cache import ScoreCache
from autoround_modifier.schemes.measurement import Choice, MeasuredUnit, Measurement
from autoround_modifier.schemes.sensitivity import SensitivityConfig, measure_sensitivity
from autoround_modifier.schemes.units import Unit, find_units

__all__ = ["check_budget", "choose_for_layers"]


def check_budget(
    model: nn.Module,
    layers: dict[str, Layer],
    options: dict[str, QuantizationScheme],
    avg_bits: float,
    whole_model: bool = False,
    shared_layers: Sequence[Sequence[str]] = (),
    engine: str = "any",
) -> None:
    """
    Refuse a budget that no choice fits, or that needs no choice, before anything is measured.
    Parameters as in `choose_for_layers`.

    :raises SchemeError: says which budgets make a difference; or if the engine reads experts under
        none of the options
    :raises RecipeError: if a target of ``shared_layers`` matches none of the layers
    """
    units = find_units(model, layers, shared_layers, engine)
    empty = _measurement(model, layers, units, options, {}, "", engine)
    empty.choose(avg_bits, whole_model)
    unquantized = any(scheme.weights is None for scheme in options.values())
    if unquantized and avg_bits >= empty.range(whole_model)[1]:
        raise SchemeError(
            f"avg_bits is {avg_bits}: the model fits without quantization; lower it, or leave "
            "UNQUANTIZED out of `options`"
        )


def choose_for_layers(
    model: nn.Module,
    blocks: dict[nn.Module, str],
    layers: dict[str, Layer],
    options: dict[str, QuantizationScheme],
    batches: list[dict[str, Any]],
    avg_bits: float,
    config: SensitivityConfig,
    whole_model: bool = False,
    shared_layers: Sequence[Sequence[str]] = (),
    cache_folder: Path | None = None,
    on_block: Callable[[], None] = lambda: None,
    engine: str = "any",
) -> Choice:
    """
    :param model: the original; it is not changed
    :param blocks: its decoder blocks and their names
    :param layers: to choose for, by name
    :param options: schemes by name; one without ``weights`` leaves a layer alone
    :param batches: arguments of the model's forward to measure on
    :param avg_bits: largest mean of bits for each weight of the layers, as saved
    :param config: how to measure
    :param whole_model: let ``avg_bits`` be a mean over all parameters of the model
    :param shared_layers: groups of layers that get one scheme, each a list of targets
    :param cache_folder: where scores are kept and found again, by content; None for nowhere
    :param on_block: called after each block that is measured, for progress bars
    :param engine: that must load the checkpoint, see `find_units`
    :return: the choice with the lowest sum of scores
    :raises SchemeError: if no choice fits the budget
    :raises CalibrationError: if no gradient reaches a layer
    :raises NonFiniteError: if the original or a gradient gives NaN or infinity
    """
    units = find_units(model, layers, shared_layers, engine)
    cache = None
    if cache_folder is not None:
        settings = {
            "blocks": list(blocks.values()),
            "score": config.score,
            "scale_search": config.scale_search,
            "seed": config.seed,
        }
        cache = ScoreCache(cache_folder, model, batches, list(layers), settings)
    scores: dict[str, dict[str, float]] = {}
    if cache is not None:
        found = {name: cache.find(scheme) for name, scheme in options.items()}
        scores = {name: known for name, known in found.items() if known is not None}
        if scores:
            logger.info(f"Scores measured before: {', '.join(scores)}")
    missing = {name: scheme for name, scheme in options.items() if name not in scores}
    if missing:
        names = {layer: name for name, layer in layers.items()}
        with torch.enable_grad():
            measured = measure_sensitivity(model, blocks, names, missing, batches, config, on_block)
        for option, scheme in missing.items():
            scores[option] = {layer: by_option[option] for layer, by_option in measured.items()}
            if cache is not None:
                cache.keep(scheme, scores[option])
    measurement = _measurement(model, layers, units, options, scores, config.score, engine)
    return measurement.choose(avg_bits, whole_model)


def _readable_for_experts(options: dict[str, QuantizationScheme], engine: str) -> list[str]:
    """:return: names of the options under which the engines read experts"""
    readable = []
    for name, scheme in options.items():
        if scheme.weights is None:
            # Transformers finds no experts in 16 bits in a checkpoint of which others are quantized
            unread = "transformers" in required_engines(engine)
        else:
            group = saved_group(scheme)
            problems = unreadable_experts(group, engine)
            unread = any(problem.fatal for problem in problems)
        if not unread:
            readable.append(name)
    left_out = [name for name in options if name not in readable]
    if left_out:
        logger.debug(f"not for experts, because of `engine: {engine}`: {', '.join(left_out)}")
    return readable


def _measurement(
    model: nn.Module,
    layers: dict[str, Layer],
    units: list[Unit],
    options: dict[str, QuantizationScheme],
    scores: dict[str, dict[str, float]],
    score: str,
    engine: str,
) -> Measurement:
    """
    :param scores: scheme -> layer -> score; empty for none yet
    :raises CalibrationError: if no layer of a unit has a score
    """
    measured, unreached, partly = [], [], []
    of_experts = _readable_for_experts(options, engine)
    sizes = {name: stored_weight(layer).numel() for name, layer in layers.items()}
    with disable_onloading():  # an onloaded parameter is another object each time
        chosen = set(layers.values())
        # By module: an embedding whose weight a chosen layer shares is saved by itself as well.
        others = {
            id(parameter): parameter
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if name != "weight" or module not in chosen
        }.values()
        other_weights = sum(p.numel() for p in others)
        other_bits = sum(p.numel() * p.itemsize * 8 for p in others)
    for unit in units:
        reached = [name for name in unit.layers if all(name in x for x in scores.values())]
        if not reached:
            unreached.append(unit.name)
        elif len(reached) < len(unit.layers):
            partly += [name for name in unit.layers if name not in reached]
        allowed = of_experts if any(EXPERT.search(x) for x in unit.layers) else list(options)
        if not allowed:
            raise SchemeError(
                f"{unit.name}: no option is one that experts can be read under by the engines that "
                f"are asked for (`engine: {engine}`). Add a symmetric integer scheme with 16-bit "
                "activations, such as W4A16, to `options`."
            )
        measured.append(
            MeasuredUnit(
                name=unit.name,
                layers=unit.layers,
                targets=unit.targets,
                num_weights=sum(sizes[name] for name in unit.layers),
                bits={
                    option: sum(saved_bits(layers[name], options[option]) for name in unit.layers)
                    for option in allowed
                },
                scores={
                    option: sum(scores[option][name] for name in reached) if scores else 0.0
                    for option in allowed
                },
            )
        )
    if unreached:
        raise CalibrationError(
            "no gradient of the model's output reaches these layers, so their schemes cannot be "
            f"chosen: {listed(unreached)}. Calibrate on data that does, or add them to `ignore`."
        )
    if partly:
        logger.warning(
            f"{len(partly)} layers saw no calibration token and count as if they lost nothing; "
            f"they share the scheme of those that did: {listed(partly)}"
        )
    return Measurement(score, options, measured, other_weights, other_bits)
