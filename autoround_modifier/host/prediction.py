"""What saving a model will write, found out on the meta device before anything runs."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from compressed_tensors.base import QUANTIZATION_CONFIG_NAME, QUANTIZATION_METHOD
from compressed_tensors.compressors import ModelCompressor, compress_module
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.utils import targets_embeddings, untie_word_embeddings
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from autoround_modifier.engines.config_names import NamedLayer, complete_config
from autoround_modifier.engines.layout import CheckpointLayout, TensorLayout
from autoround_modifier.errors import RecipeError
from autoround_modifier.host.saved_format import choose_saved_format
from autoround_modifier.host.saved_names import saved_name
from autoround_modifier.host.skeleton import skeleton

__all__ = [
    "PredictedLayer",
    "named_layers",
    "predict_layers",
    "predict_layout",
    "predict_tensors",
    "quantization_section",
]


@dataclass(frozen=True)
class PredictedLayer:
    """
    A layer whose weight will be quantized.

    :ivar shape: (out_features, in_features) of its weight
    :ivar scheme: of its weight and activations
    """

    shape: tuple[int, int]
    scheme: QuantizationScheme


def predict_layout(
    model: PreTrainedModel, configs: Iterable[QuantizationConfig]
) -> CheckpointLayout:
    """
    :param model: it is not changed
    :param configs: of the modifiers that will quantize it, in their order; schemes that its layers
        have already stay where no target matches
    :return: names, shapes and dtypes of the tensors that saving will write, and ``config.json``
    :raises RecipeError: if Transformers fails to bring them into the form of the release
    """
    return predict_layers(model, configs)[0]


def predict_layers(
    model: PreTrainedModel, configs: Iterable[QuantizationConfig]
) -> tuple[CheckpointLayout, dict[str, PredictedLayer]]:
    """
    :param model: not compressed; it is not changed
    :param configs: as in `predict_layout`
    :return: `predict_layout`, and the layers whose weights are quantized, by their names in the
        files
    :raises RecipeError: as `predict_layout`
    """
    copied, section, layers = _compressed(model, configs)
    try:
        tensors = revert_weight_conversion(copied, _saved_state(copied))
    except Exception as error:  # of any operation in the model's conversions
        raise RecipeError(
            f"Transformers {transformers.__version__} cannot save quantized layers of "
            f"{type(model).__name__} under the names of its release ({type(error).__name__}: "
            f"{error})"
        ) from error
    content = copied.config.to_dict()
    content["architectures"] = [type(model).__name__]
    if section is not None:
        content[QUANTIZATION_CONFIG_NAME] = section
    layout = CheckpointLayout(
        content,
        {name: TensorLayout(tuple(x.shape), x.dtype) for name, x in tensors.items()},
    )
    return layout, layers


def predict_tensors(
    model: PreTrainedModel, configs: Iterable[QuantizationConfig]
) -> dict[str, Tensor]:
    """
    :param model: it is not changed
    :param configs: as in `predict_layout`
    :return: the tensors that saving will write, on the meta device, by the names that they have in
        the model: `predict_layout` has those of the files
    """
    return _saved_state(_compressed(model, configs)[0])


def _compressed(
    model: PreTrainedModel, configs: Iterable[QuantizationConfig]
) -> tuple[PreTrainedModel, dict[str, Any] | None, dict[str, PredictedLayer]]:
    """
    :return: a copy on the meta device, as saving leaves the model; its `quantization_section`; its
        layers with quantized weights, by their names in the files
    """
    copied = skeleton(model)
    assert isinstance(copied, PreTrainedModel)
    with _without_log("compressed_tensors.utils.match"):  # of targets, which the run says itself
        for config in configs:
            apply_quantization_config(copied, config, show_progress=False)
    named = [(name, x) for name, x in copied.named_modules() if is_module_quantized(x)]
    if targets_embeddings(copied, named):
        untie_word_embeddings(copied)
    quantized = [module for _, module in named]
    for module in quantized:
        choose_saved_format(module.quantization_scheme, type(module))
    # Of the schemes before compressing, which changes their status.
    section = quantization_section(copied)
    renamed, layers = saved_name(copied), {}
    for path, module in named:
        scheme = cast(QuantizationScheme, module.quantization_scheme)
        if isinstance(module, (nn.Linear, nn.Embedding)) and scheme.weights is not None:
            rows, columns = module.weight.shape
            name = renamed(f"{path}.weight").rpartition(".")[0]
            layers[name] = PredictedLayer((rows, columns), scheme)
    for module in quantized:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            compress_module(module)
            _pack_zero_point(module)
    return copied, section, layers


def _saved_state(copied: PreTrainedModel) -> dict[str, Tensor]:
    state = copied.state_dict(keep_vars=True)
    for name, source in (getattr(copied, "all_tied_weights_keys", None) or {}).items():
        if name in state and state[name] is state.get(source):
            del state[name]  # one copy is saved
    return state


@contextlib.contextmanager
def _without_log(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def _pack_zero_point(module: Any) -> None:
    """On the meta device compressed-tensors 0.19 leaves zero points as they are."""
    args, zero_point = (
        module.quantization_scheme.weights,
        module._parameters.get("weight_zero_point"),
    )
    if "weight_packed" not in module._parameters or zero_point is None:
        return
    if zero_point.dtype != torch.int32:
        rows, columns = zero_point.shape
        shape = (math.ceil(rows * args.num_bits / 32), columns)
        module.weight_zero_point = nn.Parameter(
            torch.empty(shape, dtype=torch.int32, device="meta"), requires_grad=False
        )


def quantization_section(model: nn.Module) -> dict[str, Any] | None:
    """
    :param model: quantized, before or after it was compressed
    :return: ``quantization_config`` of its ``config.json``, under names that hold for every engine,
        `complete_config`; None if nothing is quantized
    """
    config = ModelCompressor.from_pretrained_model(model).quantization_config
    if config is None:
        return None
    config.quantization_status = QuantizationStatus.COMPRESSED
    section = json.loads(json.dumps(config.model_dump(exclude={"quant_method"})))
    section["quant_method"] = QUANTIZATION_METHOD
    return complete_config(section, list(named_layers(model, config)))


def named_layers(model: nn.Module, config: QuantizationConfig) -> Iterator[NamedLayer]:
    """
    Yield the linear layers, and the embeddings that are quantized, with their names.

    :param config: of the model, as the host writes it
    """
    schemes = list(config.config_groups.items())
    renamed = saved_name(model)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for path, module in model.named_modules():
        quantized = is_module_quantized(module)
        is_linear = isinstance(module, nn.Linear)
        if not is_linear and not (isinstance(module, nn.Embedding) and quantized):
            continue
        group = None
        if quantized:
            group = next((name for name, x in schemes if x == module.quantization_scheme), None)
        part = next((x for x in ("weight", "weight_packed") if x in module._parameters), "weight")
        saved = renamed(f"{path}.{part}").rpartition(".")[0]
        kind = "Embedding" if not is_linear else "Head" if module is head else "Linear"
        yield NamedLayer(path, saved, group, cast(Any, kind))
