"""
Modifiers, sessions and hooks of LLM-Compressor.

Two things here depend on private behaviour of LLM-Compressor 0.14. Its sequential pipeline feeds
each block the output of the quantized blocks before it (`propagate_error`) unless a modifier's
class is *named* ``AutoRoundModifier``; AutoRound needs full-precision inputs and targets. And its
`ModifierFactory` knows only its own modules, so that modifiers of other packages are registered.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig, disable_quantization
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import patch_attr
from llmcompressor import oneshot as _oneshot
from llmcompressor.core import Event, State, active_session
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modifiers import Modifier, ModifierFactory
from llmcompressor.modifiers.quantization.calibration import apply_calibration_status
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.transformers_helpers import HFTracer
from llmcompressor.recipe import Recipe
from llmcompressor.utils import targets_embeddings, untie_word_embeddings
from llmcompressor.utils.helpers import DisableQuantization, eval_context
from llmcompressor.utils.pytorch import infer_sequential_targets
from torch import nn
from torch.fx import _symbolic_trace
from transformers import PreTrainedModel

__all__ = [
    "AUTOROUND_CLASS_NAME",
    "DisableQuantization",
    "Event",
    "HooksMixin",
    "Modifier",
    "PlainDataModifier",
    "QuantizationMixin",
    "Recipe",
    "State",
    "apply_calibration_status",
    "as_recipe",
    "disable_quantization",
    "eval_context",
    "host_oneshot",
    "infer_sequential_targets",
    "is_module_quantized",
    "known_modifiers",
    "quantization_configs",
    "recipe_modifiers",
    "recipe_stage",
    "register_modifier",
    "running_model",
    "targets_embeddings",
    "untie_word_embeddings",
]

# The name by which the sequential pipeline recognises AutoRound.
AUTOROUND_CLASS_NAME = "AutoRoundModifier"
PATCH_FOR_TRACING = HFTracer.patch_for_tracing
PIN_MEMORY = IntermediatesCache.pin_memory


def host_oneshot(**kwargs: Any) -> PreTrainedModel:
    """
    `llmcompressor.oneshot` with a model of which `check_not_compressed` has been asked.
    LLM-Compressor's own check reads the ``config.json`` that the model is from, and so refuses
    weights that were dequantized as they were loaded.
    """
    with (
        patch_attr(Oneshot, "validate_model", lambda self, model: None),
        patch_attr(HFTracer, "patch_for_tracing", _restored_after_tracing),
        patch_attr(IntermediatesCache, "pin_memory", _pinned_for_an_accelerator),
        _wraps_forgotten(),
    ):
        return _oneshot(**kwargs)


def _pinned_for_an_accelerator(cache: IntermediatesCache, *arguments: Any, **options: Any) -> None:
    """`AWQModifier` pins memory even where there is no accelerator, and PyTorch then fails."""
    if torch.accelerator.is_available():
        PIN_MEMORY(cache, *arguments, **options)


@contextmanager
def _restored_after_tracing(tracer: HFTracer, root: nn.Module) -> Iterator[None]:
    """
    Where the tracer of the sequential pipeline fails, it leaves its own `torch.finfo` and others in
    place, and PyTorch's compiler then refuses `torch.finfo`.
    """
    replaced = PATCH_FOR_TRACING(tracer, root)
    replaced.__enter__()
    try:
        yield
    finally:
        replaced.__exit__(None, None, None)  # as if there were no error, which it does not handle


@contextmanager
def _wraps_forgotten() -> Iterator[None]:
    """
    Let models be freed. The tracer of the sequential pipeline calls `torch.fx.wrap` in namespaces
    that hold a module of the model, and PyTorch never forgets what was wrapped.
    """
    before = set(_symbolic_trace._wrapped_fns_to_patch)
    try:
        yield
    finally:
        for key in set(_symbolic_trace._wrapped_fns_to_patch) - before:
            if isinstance(_symbolic_trace._wrapped_fns_to_patch[key].get("self"), nn.Module):
                del _symbolic_trace._wrapped_fns_to_patch[key]


class PlainDataModifier(Modifier):
    """A modifier whose fields are dumped as plain data, so that the saved recipe can be loaded."""

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        return super().model_dump(**{"mode": "json", **kwargs})


def register_modifier(modifier: type[Modifier]) -> None:
    """Let recipes name this class; in place of a built-in one of the same name."""
    ModifierFactory.register(modifier.__name__, modifier)


def known_modifiers() -> list[str]:
    """:return: names of all modifiers that a recipe may have, those of other packages included"""
    if not ModifierFactory._loaded:
        ModifierFactory.refresh()  # imports the built-in ones; registered ones stay
    registries = (
        ModifierFactory._main_registry,
        ModifierFactory._experimental_registry,
        ModifierFactory._registered_registry,
    )
    names = {name for registry in registries for name in registry}
    return sorted(names - {Modifier.__name__})  # the base class


def as_recipe(recipe: Any, stage: str | None = None) -> Recipe:
    """
    :param recipe: path, YAML text, `Recipe`, modifier, or a list of modifiers
    :param stage: the one that runs; None for all
    :return: the recipe with its modifiers made; `host_oneshot` runs these objects
    """
    source = str(recipe) if isinstance(recipe, os.PathLike) else recipe
    return Recipe.create_instance(source, target_stage=stage)


def running_model() -> Any:
    """:return: the model of the last run of LLM-Compressor, or of the one that goes on; or None"""
    return active_session().state.model


def recipe_modifiers() -> list[Modifier]:
    """:return: the modifiers of the running recipe; in a pass of its own, that modifier alone"""
    return list(active_session().lifecycle.recipe.modifiers)


def quantization_configs(modifiers: Iterable[Modifier]) -> list[QuantizationConfig]:
    """
    :param modifiers: of a recipe
    :return: how those that quantize will do so, in their order
    """
    return [
        modifier.resolved_config
        for modifier in modifiers
        if isinstance(modifier, QuantizationMixin)
        and (modifier.scheme is not None or modifier.config_groups is not None)
    ]


def recipe_stage() -> str:
    """:return: the stage of the running recipe"""
    return active_session().lifecycle.recipe.stage
