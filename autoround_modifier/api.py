"""What can be done without a recipe: quantize, choose schemes, distill, evaluate, read weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoround_modifier.calibration import sample_batches
from autoround_modifier.checkpoints.saved_weights import SavedWeights, dtype_named
from autoround_modifier.distillation import (
    DistillationConfig,
    DistillationResult,
    record_teacher,
    train_scales,
    trainable_layers,
    trainable_norms,
    weights_on_device,
)
from autoround_modifier.engines.check import required_engines
from autoround_modifier.entrypoint import oneshot
from autoround_modifier.errors import RecipeError
from autoround_modifier.evaluation import Divergence, compare
from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.host.blocks import find_blocks
from autoround_modifier.host.lifecycle import eval_context
from autoround_modifier.host.quantized_weights import quantized_layers, read_layer
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.validation import check_one_process, layers_to_choose_for
from autoround_modifier.schemes import Choice, check_budget, choose_for_layers, resolve_options
from autoround_modifier.schemes.scores import SCORES
from autoround_modifier.schemes.sensitivity import SensitivityConfig

__all__ = ["choose_schemes", "distill", "evaluate", "quantize", "quantized_weights"]


def quantize(
    model: str | PreTrainedModel,
    scheme: str | Mapping[str, Any] | Choice,
    dataset: Any = None,
    *,
    ignore: Sequence[str] = ("lm_head",),
    output_dir: str | os.PathLike[str] | None = None,
    formats: str | Sequence[str] | None = None,
    oneshot_arguments: Mapping[str, Any] | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """
    Quantize a model, without a recipe.

    :param model: model, or name or path of one
    :param scheme: a preset scheme such as ``"W4A16"``, groups as ``config_groups`` of a recipe, or
        what `choose_schemes` returned
    :param dataset: calibration data, as in `oneshot`; None for presets that need none
    :param ignore: layers to leave alone
    :param output_dir: where to save; nothing is saved if None
    :param formats: to write there, as in `oneshot`, such as ``["compressed-tensors", "gptq"]``
    :param oneshot_arguments: further arguments of `oneshot`, such as ``tokenizer``,
        ``num_calibration_samples`` and ``max_seq_length``
    :param fields: fields of `AutoRoundModifier`, such as ``preset`` or ``iters``
    :return: the quantized model
    :raises pydantic.ValidationError: if a field does not exist or has a wrong value
    :raises RecipeError: and the other errors of `oneshot`
    """
    schemes: dict[str, Any]
    if isinstance(scheme, str):
        schemes = {"scheme": scheme}
    elif isinstance(scheme, Choice):
        schemes = {"config_groups": scheme.config_groups()}
    else:
        schemes = {"config_groups": dict(scheme)}
    modifier = AutoRoundModifier(**schemes, ignore=list(ignore), **fields)
    return oneshot(
        model=model,
        recipe=modifier,
        dataset=dataset,
        output_dir=output_dir,
        formats=formats,
        **(oneshot_arguments or {}),
    )


def choose_schemes(
    model: PreTrainedModel,
    options: Sequence[str | Mapping[str, Any]],
    avg_bits: float,
    dataset: Iterable[Mapping[str, Any]],
    *,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
    shared_layers: Sequence[Sequence[str]] = (),
    whole_model: bool = False,
    sequential_targets: list[str] | None = None,
    score: str = "fisher",
    scale_search: bool = True,
    batch_size: int = 8,
    seed: int = 42,
    cache_dir: str | os.PathLike[str] | None = None,
    engine: str = "any",
) -> Choice:
    """
    Choose a scheme for each layer, so that the model fits a budget of bits with the least loss.
    Parameters not listed below are the fields of `AutoSchemeModifier`.

    :param model: the original; it is not changed
    :param options: schemes to choose from, as in `AutoSchemeModifier`
    :param avg_bits: largest mean of bits for each weight of the layers, as saved
    :param dataset: samples with ``input_ids``, one list or tensor of token ids each, and perhaps
        ``attention_mask`` and ``loss_mask``; or batches of them, (batch, length)
    :param cache_dir: where scores are kept and found again; None for nowhere
    :return: the choice; `quantize` takes it as ``scheme``
    :raises RuntimeError: if several processes were started together
    :raises SchemeError: if an option does not fit a layer, or no choice fits the budget
    :raises RecipeError: if no module is targeted, or `score` is unknown
    :raises CalibrationError: if there is no data, or it does not reach a layer
    :raises NonFiniteError: if a weight or an output has NaN or infinity
    :raises ValueError: if there is no such ``engine``
    """
    check_one_process("choose_schemes")
    if score not in SCORES:
        raise RecipeError(f"unknown score `{score}`; use one of {', '.join(SCORES)}")
    schemes = resolve_options(list(options))
    layers = layers_to_choose_for(model, schemes, list(targets), list(ignore))
    required_engines(engine)  # refuses unknown ones
    check_budget(model, layers, schemes, avg_bits, whole_model, shared_layers, engine)
    return choose_for_layers(
        model,
        find_blocks(model, sequential_targets),
        layers,
        schemes,
        sample_batches(dataset),
        avg_bits,
        SensitivityConfig(score, scale_search, batch_size, seed),
        whole_model,
        shared_layers,
        None if cache_dir is None else Path(cache_dir),
        engine=engine,
    )


def distill(
    model: PreTrainedModel,
    original: PreTrainedModel,
    dataset: Iterable[Mapping[str, Any]],
    *,
    sequential_targets: list[str] | None = None,
    iters: int = 50,
    lr: float = 0.005,
    norm_lr: float | None = None,
    batch_size: int = 4,
    position_fraction: float = 1.0,
    gradient_checkpointing: bool = True,
    holdout_fraction: float = 0.125,
    seed: int = 42,
) -> DistillationResult:
    """
    Train the weight scales of a quantized model, with the gains of its norms and its biases, so
    that its next-token distribution comes closer to the original's. Parameters not listed below are
    the fields of `ScaleDistillationModifier`.

    :param model: quantized in memory, by `quantize` or `oneshot`; changed in place, or left as it
        was if training did not help
    :param original: the same model in full precision
    :param dataset: as in `choose_schemes`
    :return: what training changed
    :raises RuntimeError: if several processes were started together
    :raises RecipeError: if no linear layer is quantized
    :raises SchemeError: if a scale cannot be trained
    :raises CalibrationError: if there is no data
    :raises NonFiniteError: if one of the models gives NaN or infinity
    """
    check_one_process("distill")
    trainable_layers(model)  # refuses before anything runs
    batches = sample_batches(dataset)
    with weights_on_device(original), eval_context(original):
        teacher = record_teacher(original, batches, position_fraction, batch_size)
    with weights_on_device(model) as scale_of:
        scales = [scale_of(layer, args) for layer, args in trainable_layers(model).items()]
        return train_scales(
            model,
            list(find_blocks(model, sequential_targets)),
            scales,
            trainable_norms(model),
            teacher,
            DistillationConfig(
                iters,
                lr,
                lr / 2 if norm_lr is None else norm_lr,
                batch_size,
                gradient_checkpointing,
                holdout_fraction,
                seed,
            ),
        )


def evaluate(
    original: nn.Module, quantized: nn.Module, samples: Tensor | Sequence[Sequence[int]]
) -> Divergence:
    """
    How far a quantized model is from its original.

    :param original: the original model
    :param quantized: the quantized model
    :param samples: (samples, tokens), int64, at least two tokens each, all of one length: token ids
        of text that calibration never saw
    :return: KL divergence in nats, top-1 agreement and perplexity, means over predicted tokens
    """
    return compare(original, quantized, torch.as_tensor(samples))


def quantized_weights(
    source: nn.Module | str | os.PathLike[str],
) -> Mapping[str, QuantizedWeight]:
    """
    The integers (or floating-point codes), scales and zero points of a quantized model, by layer.

    :param source: a model in memory, before or after it was saved, or the folder of a checkpoint in
        a compressed-tensors format
    :return: name of the layer -> its quantized weight. Weights of a checkpoint are read, one at a
        time, when they are asked for, and the names are those of the file
    :raises RecipeError: if nothing in the model is quantized
    :raises CheckpointError: if the folder is no such checkpoint; a weight of it that cannot be read
        raises it when it is asked for
    """
    if not isinstance(source, nn.Module):
        return SavedWeights(Path(source))
    dtype = dtype_named(getattr(getattr(source, "config", None), "dtype", None))
    found = {name: read_layer(layer, args, dtype) for name, layer, args in quantized_layers(source)}
    if not found:
        raise RecipeError("the model has no quantized linear layer or embedding")
    return found
