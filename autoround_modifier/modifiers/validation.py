"""Everything that can be refused before the first forward pass is refused here."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Iterable

import torch
from loguru import logger
from torch import nn
from transformers.pytorch_utils import Conv1D

from autoround_modifier.activations import unsupported_activations, unsupported_kv_cache
from autoround_modifier.calibration import check_samples
from autoround_modifier.errors import (
    CalibrationError,
    NonFiniteError,
    RecipeError,
    SchemeError,
    listed,
)
from autoround_modifier.host.applied_schemes import quantized_names
from autoround_modifier.host.blocks import input_embeddings
from autoround_modifier.host.experts import LinearExperts2D
from autoround_modifier.host.layers import Layer, is_on_disk, stored_weight
from autoround_modifier.host.lifecycle import is_module_quantized
from autoround_modifier.host.matching import is_match, match_named_modules, match_targets
from autoround_modifier.host.schemes import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationType,
    is_cached_attention_module,
    is_microscaling,
    unsupported_weights,
)
from autoround_modifier.modifiers.routers import unlike_linear, untargeted_routers
from autoround_modifier.parallel import gathered, is_distributed

__all__ = [
    "Schemes",
    "check_calibration_data",
    "check_experts",
    "check_finite",
    "check_fit",
    "check_kv_cache",
    "check_layers_in_blocks",
    "check_not_quantized",
    "check_not_taken",
    "check_one_process",
    "check_processes",
    "check_same_blocks",
    "check_schemes_unchanged",
    "layers_to_choose_for",
    "log_uncovered_layers",
    "resolve_schemes",
    "warn_of_blocks_without_mask",
]

Schemes = dict[str, tuple[Layer, QuantizationScheme]]


def resolve_schemes(model: nn.Module, config: QuantizationConfig) -> Schemes:
    """
    Which scheme each module will get, by the rules of compressed-tensors, without changing the
    model: an exact name wins over a regular expression, and that over a class name.

    :raises RecipeError: if no module matches, or a target matches modules without a weight matrix
    """
    by_target = OrderedDict(
        (target, scheme) for scheme in config.config_groups.values() for target in scheme.targets
    )
    matched: dict[str, Layer] = {}
    wrong = []
    for name, module in match_named_modules(model, by_target, config.ignore):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            matched[name] = module
        else:
            wrong.append(name)
    if wrong:
        raise RecipeError(
            f"targets match modules that are neither Linear nor Embedding: {listed(wrong)}. "
            "Target the linear layers inside them."
        )
    if not matched:
        raise RecipeError(
            f"no module matches targets {list(by_target)} after ignoring {config.ignore}. Modules "
            f"of this model are named like {listed(_example_names(model))}." + _conv1d_hint(model)
        )
    return {
        name: (module, by_target[match_targets(name, module, by_target)[0]])
        for name, module in matched.items()
    }


def _conv1d_hint(model: nn.Module) -> str:
    if not any(isinstance(module, Conv1D) for module in model.modules()):
        return ""
    return (
        " Its layers are of the class Conv1D of Transformers, which compressed-tensors does not "
        "quantize."
    )


@torch.no_grad()
def check_experts(model: nn.Module) -> None:
    """
    :raises RecipeError: if LLM-Compressor has split experts into linear layers that do not run
    """
    tried = set()
    for name, module in model.named_modules():
        if not isinstance(module, LinearExperts2D) or type(module) in tried:
            continue
        tried.add(type(module))
        expert = module[0]
        apply_gate = getattr(expert, "_apply_gate", None)  # a method of the model's own experts
        if apply_gate is None:
            continue
        first = next(x for x in expert.modules() if isinstance(x, nn.Linear))
        try:
            apply_gate(torch.zeros(1, 2 * first.out_features, device="meta"))
        except NotImplementedError:
            continue  # it got as far as a layer that takes no meta tensors
        except Exception as error:
            raise RecipeError(
                f"{name}: LLM-Compressor does not know how these experts compute "
                f"({type(error).__name__}: {error}), so they cannot be calibrated. A later release "
                "of it may."
            ) from error


def check_finite(layers: dict[str, Layer]) -> None:
    """
    :param layers: those on the meta device have no values
    :raises NonFiniteError: naming every layer whose weight has NaN or infinity
    """
    non_finite = [
        name
        for name, x in layers.items()
        if not (weight := x.weight).is_meta and not torch.isfinite(weight).all()
    ]
    if non_finite:
        raise NonFiniteError(f"weights with NaN or infinity: {listed(non_finite)}")


def check_fit(schemes: Schemes) -> None:
    """:raises SchemeError: naming every layer whose scheme is not supported or does not fit"""
    unsupported: dict[str, list[str]] = {}  # by reason
    indivisible: dict[str, list[str]] = {}  # by what would do
    columns_of: dict[str, list[int]] = {}  # by the name of the scheme without its group size
    for name, (module, scheme) in schemes.items():
        reason = (
            unsupported_weights(scheme.weights)
            or unsupported_activations(scheme)
            or _unfit_reason(module, scheme)
        )
        if reason is not None:
            unsupported.setdefault(reason, []).append(name)
            continue
        columns = stored_weight(module).shape[-1]
        sizes = {args.group_size for args in (scheme.weights, scheme.input_activations) if args}
        for group_size in sizes - {None}:
            if columns % group_size:
                fitting = [size for size in range(256, 15, -8) if columns % size == 0]
                remedy = f"{columns} input features, group_size {group_size}" + (
                    f"; {', '.join(map(str, fitting))} would divide" if fitting else ""
                )
                indivisible.setdefault(remedy, []).append(name)
                columns_of.setdefault(_name_without_groups(scheme), []).append(columns)

    if unsupported:
        reasons = [f"{reason}: {listed(names)}" for reason, names in unsupported.items()]
        raise SchemeError("AutoRoundModifier cannot quantize these layers: " + "; ".join(reasons))
    if indivisible:
        layers = [f"{remedy}: {listed(names)}" for remedy, names in indivisible.items()]
        fitting_schemes = []
        for prefix, widths in columns_of.items():
            dividing = [size for size in (128, 64, 32, 16) if math.gcd(*widths) % size == 0]
            if prefix and dividing:
                fitting_schemes.append(f"{prefix}G{dividing[0]}")
        example = f", such as {', '.join(fitting_schemes)}" if fitting_schemes else ""
        raise SchemeError(
            "group_size does not divide the input features of these layers; choose one that does"
            f"{example}, use `strategy: channel`, or add the layers to `ignore`:\n  "
            + "\n  ".join(layers)
        )


def _name_without_groups(scheme: QuantizationScheme) -> str:
    """:return: such as ``W4A16_ASYM_``; empty where no name with a group size stands for it"""
    weights, inputs = scheme.weights, scheme.input_activations
    if weights.type != QuantizationType.INT or (
        inputs is not None and (inputs.type != QuantizationType.INT or inputs.dynamic is not True)
    ):
        return ""
    zero_points = "" if weights.symmetric else "_ASYM_"
    return f"W{weights.num_bits}A{16 if inputs is None else inputs.num_bits}{zero_points}"


def layers_to_choose_for(
    model: nn.Module,
    options: dict[str, QuantizationScheme],
    targets: list[str],
    ignore: list[str],
) -> dict[str, Layer]:
    """
    :param options: schemes by name, each of which must fit all layers
    :return: the targeted layers by name
    :raises RecipeError: if no module is targeted, or a layer has a scheme already
    :raises SchemeError: if an option does not fit a layer
    :raises NonFiniteError: if a weight has NaN or infinity
    """
    layers: dict[str, Layer] = {}
    for option, scheme in options.items():
        groups = {"group_0": scheme.model_copy(update={"targets": targets})}
        config = QuantizationConfig(config_groups=groups, ignore=ignore)
        left_alone = [*untargeted_routers(model, config), *unlike_linear(model, config)]
        config.ignore = [*ignore, *left_alone]
        resolved = resolve_schemes(model, config)
        first = not layers
        layers = {name: layer for name, (layer, _) in resolved.items()}
        if first:
            check_finite(layers)
        if scheme.weights is None:
            continue
        try:
            check_fit(resolved)
        except SchemeError as error:
            raise SchemeError(f"option {option}: {error}") from error
    quantized = [name for name, layer in layers.items() if is_module_quantized(layer)]
    if quantized:
        raise RecipeError(
            f"these layers have a scheme already: {listed(quantized)}. Add them to `ignore`, or "
            "choose before the modifier that gave it."
        )
    return layers


def check_kv_cache(model: nn.Module, args: QuantizationArgs | None) -> None:
    """
    :param args: ``kv_cache_scheme`` of the recipe
    :raises SchemeError: if no engine keeps such a cache, or the model has no attention layer whose
        cache compressed-tensors can quantize
    """
    if args is None:
        return
    reason = unsupported_kv_cache(args)
    if reason is not None:
        raise SchemeError(reason)
    if not any(is_cached_attention_module(module) for module in model.modules()):
        raise SchemeError(
            "kv_cache_scheme: the model has no attention layer with `k_proj` or `v_proj` and a "
            "cache; remove it"
        )


def _unfit_reason(module: Layer, scheme: QuantizationScheme) -> str | None:
    """:return: why this kind of layer cannot have a scheme that others can, or None"""
    args = scheme.weights
    if isinstance(module, nn.Embedding):
        if args.type != QuantizationType.INT:
            return "embeddings take integers only"
        if scheme.input_activations is not None:
            return "the inputs of embeddings are token ids, not activations"
    dtype = stored_weight(module).dtype
    if is_microscaling(args) and dtype != torch.bfloat16:
        return (
            f"compressed-tensors loads MX weights as bfloat16, and the model is in {dtype}; load "
            "it in bfloat16"
        )
    return None


def check_not_quantized(model: nn.Module, checkpoint_dir: str | None = None) -> None:
    """
    :param checkpoint_dir: where finished blocks of an earlier run may be, for the message
    :raises RecipeError: if an earlier run quantized the model, or a part of it
    """
    names = quantized_names(model)
    if not names:
        return
    going_on = (
        ""
        if checkpoint_dir is None
        else f" Blocks that are finished in {checkpoint_dir} are taken from there."
    )
    raise RecipeError(
        f"the model is quantized already, at least in part: {listed(names, 4)}. Its weights are no "
        "longer the original ones: load the original again, and do everything in one recipe."
        f"{going_on}"
    )


def check_layers_in_blocks(
    blocks: dict[nn.Module, str], schemes: Schemes, iters: int | None
) -> None:
    """:raises RecipeError: if no targeted linear layer is inside of a block, so none is tuned"""
    inside = {part for block in blocks for part in block.modules()}
    layers = {name: x for name, (x, _) in schemes.items() if isinstance(x, nn.Linear)}
    if any(layer in inside for layer in layers.values()):
        return
    where = (
        "the model has no list of blocks: name their class in `sequential_targets` of `oneshot`"
        if not blocks
        else "the blocks are " + listed(sorted({type(block).__name__ for block in blocks}))
    )
    raise RecipeError(
        f"`iters` is {iters}, but no targeted layer is inside of a block, so none can be tuned; "
        f"targeted are {listed(list(schemes), 4)}, and {where}. To quantize these layers by the "
        "scale search alone, use `preset: opt_rtn` (`iters: 0`)."
    )


def check_not_taken(schemes: Schemes) -> None:
    """
    :param schemes: of the layers to quantize, before they are given to them
    :raises RecipeError: if a modifier that runs before has given some of them a scheme
    """
    taken = [name for name, (layer, _) in schemes.items() if _weight_args(layer) is not None]
    if taken:
        raise RecipeError(_same_layers(taken))


def _same_layers(names: list[str]) -> str:
    return (
        "another modifier of the recipe quantizes the same layers: "
        f"{listed(names)}. Add them to `ignore` of one of the two."
    )


def check_schemes_unchanged(names: dict[Layer, str], args: dict[Layer, QuantizationArgs]) -> None:
    """
    :param names: the layers to quantize
    :param args: the arguments each was given when the recipe was initialised
    :raises RecipeError: if another modifier has replaced some of them since
    """
    taken = [name for layer, name in names.items() if _weight_args(layer) != args[layer]]
    if taken:
        raise RecipeError(_same_layers(taken))


def log_uncovered_layers(model: nn.Module, blocks: dict[nn.Module, str], ignore: list[str]) -> None:
    """Log the linear layers inside of blocks that are neither targeted nor ignored."""
    left_out = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and _weight_args(layer) is None
        and any(name.startswith(f"{block}.") for block in blocks.values())
        and not is_match(name, layer, ignore)
    ]
    if left_out:
        logger.info(
            f"{len(left_out)} linear layers inside of blocks are neither targeted nor ignored and "
            f"stay as they are: {listed(left_out)}"
        )


def warn_of_blocks_without_mask(blocks: Iterable[nn.Module]) -> None:
    """Warn of blocks that take no attention mask, by which padding is known."""
    without_mask = {
        type(block).__name__
        for block in blocks
        if "attention_mask" not in inspect.signature(block.forward).parameters
    }
    if without_mask:
        logger.warning(
            f"{listed(sorted(without_mask))} receive no `attention_mask`: padding in the "
            "calibration data would count as text"
        )


def _weight_args(layer: nn.Module) -> QuantizationArgs | None:
    return getattr(getattr(layer, "quantization_scheme", None), "weights", None)


def check_one_process(what: str) -> None:
    """
    :param what: runs in one process only, for the message
    :raises RuntimeError: if several processes were started together
    """
    if is_distributed():
        raise RuntimeError(f"{what} does not run in several processes; start one process")


def check_processes(model: nn.Module) -> None:
    """:raises RuntimeError: if several processes share a model that is offloaded to disk"""
    if is_distributed() and is_on_disk(model):
        raise RuntimeError(
            "several processes cannot write to one model on disk; offload it to the CPU, or start "
            "one process"
        )


def check_same_blocks(names: list[str]) -> None:
    """
    :param names: of the blocks that this process ran
    :raises CalibrationError: if other processes ran others
    """
    missing = {name for share in gathered(names) for name in share} - set(names)
    if any(gathered(bool(missing))):
        raise CalibrationError(
            f"not all processes ran the same blocks; here {listed(sorted(missing)) or 'none'} "
            "lacked samples. Each process needs samples of every kind, such as texts with images."
        )


def check_calibration_data(dataloader: object, reason: str, model: nn.Module) -> None:
    """
    :param dataloader: what `oneshot` made of its ``dataset``; None if it got none
    :param reason: why data is needed
    :param model: which the data will run through
    :raises CalibrationError: if there is none, or it is empty, or its samples cannot calibrate
    """
    if dataloader is None:
        raise CalibrationError(
            f"{reason} needs calibration data: pass `dataset=` to `oneshot`, for example the "
            "output of `autoround_modifier.self_generated(model, tokenizer)`."
        )
    try:
        size = len(dataloader)  # type: ignore[arg-type]
    except TypeError:
        return  # a stream has no length
    if size == 0:
        raise CalibrationError("the calibration dataset is empty")
    check_samples(getattr(dataloader, "dataset", dataloader), _vocabulary_size(model))


def _vocabulary_size(model: nn.Module) -> int | None:
    """:return: number of token ids that the model embeds, if it says so"""
    weight = getattr(input_embeddings(model), "weight", None)
    return None if weight is None or weight.ndim != 2 else len(weight)


def _example_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:4]
