"""
A model as Transformers builds it, without the weights that stay packed.

Transformers makes the modules, gives tensors of old checkpoints their names of today, ties weights
and reads everything that is not packed. A quantizer is how it lets others replace modules before
that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.errors import CheckpointError, listed
from autoround_modifier.host.empty_model import split_experts
from autoround_modifier.host.loading import auto_class
from autoround_modifier.inference.packed_layer import leave_without_weight
from autoround_modifier.inference.packed_weight import PackedSpec
from autoround_modifier.inference.reading import NotPackedError

__all__ = ["METHOD", "kind_of", "load_skeleton"]

METHOD = "autoround-modifier"
# Of experts, as some architectures name them in files
EXPERT_LAYERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# Names of tensors that are read once the model is there
READ_LATER = r"\.weight_(packed|scale|zero_point|shape)$"


@register_quantization_config(METHOD)
class _PackedConfig(QuantizationConfigMixin):
    """
    :param specs: name of a layer, as in the files -> its weight
    """

    def __init__(self, specs: Mapping[str, PackedSpec] | None = None, **kwargs: Any):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.specs = dict(specs or {})
        self.found: dict[str, PackedSpec] = {}  # by the paths of modules

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class _PackedQuantizer(HfQuantizer):
    """Takes the weights of layers away before a model is loaded."""

    def __init__(self, quantization_config: _PackedConfig, **kwargs: Any):
        # As of a model that is not quantized: then Transformers reads its tensors one by one.
        super().__init__(quantization_config, pre_quantized=False)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        config = cast(_PackedConfig, self.quantization_config)
        config.found = _modules_of(model, config.specs)
        for path, spec in config.found.items():
            leave_without_weight(model.get_submodule(path), spec)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, READ_LATER}
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def load_skeleton(
    folder: str,
    specs: Mapping[str, PackedSpec],
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, dict[str, PackedSpec]]:
    """
    :param folder: of the checkpoint
    :param specs: name of each layer whose weight stays packed, as in the files -> its weight
    :param config: of the model
    :param device: on which it will be
    :param dtype: of what is not packed; ``auto`` for that of the checkpoint
    :return: the model, complete but for those weights, and path of each layer -> its weight
    :raises NotPackedError: if such a weight belongs to a module that cannot take it
    :raises CheckpointError: if tensors of the model are not in the checkpoint
    """
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    loader = auto_class(config.to_dict())
    arguments: dict[str, Any] = {
        "config": config,
        "quantization_config": _PackedConfig(specs),
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    if device.type != "cpu":
        arguments["device_map"] = {"": device}
    model, info = loader.from_pretrained(folder, output_loading_info=True, **arguments)
    tied = _tied(model)
    missing = sorted(name for name in info["missing_keys"] if name not in tied)
    if missing:
        raise CheckpointError(f"{folder} lacks tensors of the model: {listed(missing)}")
    return model, model.hf_quantizer.quantization_config.found


def kind_of(module: nn.Module) -> str:
    """:return: of `inference.backends.Use`"""
    if isinstance(module, nn.Embedding):
        return "embedding"
    plain = type(module).__bases__[-1] is nn.Linear
    return "linear" if plain else "own"


def _modules_of(model: PreTrainedModel, specs: Mapping[str, PackedSpec]) -> dict[str, PackedSpec]:
    """
    :return: path of the module -> its weight. Layers for multi-token prediction are in the files of
        some models that do not run them
    :raises NotPackedError: if a weight belongs to something else than a module of its shape
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    split_experts(model, _holds_quantized(specs, renamings).__contains__)
    places = model.state_dict()
    found, refused = {}, []
    for name, spec in specs.items():
        is_expert = EXPERT.search(name) is not None  # which have layers of their own here
        key, fused = rename_source_key(
            f"{name}.weight",
            renamings,
            [] if is_expert else converters,
            model.base_model_prefix,
            places,
        )
        path = key.removesuffix(".weight")
        if is_expert and key not in places:
            head, _, leaf = path.rpartition(".")
            path = f"{head}.{EXPERT_LAYERS.get(leaf, leaf)}"
        module = _module(model, path)
        if isinstance(module, (nn.Linear, nn.Embedding)) and fused is None:
            found[path] = spec
            if tuple(module.weight.shape) != (spec.out_features, spec.in_features):
                refused.append(name)
        elif module is not None or fused is not None:
            refused.append(name)
    if refused:
        raise NotPackedError(
            f"the model has no linear layers or embeddings of their shape for {listed(refused, 2)}"
        )
    for key, source in _tied(model).items():
        if key.removesuffix(".weight") in found or source.removesuffix(".weight") in found:
            raise NotPackedError(f"{key} is tied to {source}, which is quantized")
    return found


def _holds_quantized(specs: Mapping[str, PackedSpec], renamings: list[WeightRenaming]) -> set[str]:
    """:return: names of modules that hold experts, of which some are quantized"""
    found = set()
    for name in specs:
        key, _ = rename_source_key(f"{name}.weight", renamings, [])
        expert = EXPERT.search(key)
        if expert is not None:
            found.add(key[: expert.start() - 1])
    return found


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _tied(model: PreTrainedModel) -> Mapping[str, str]:
    """:return: name of a tensor -> name of the one that it is"""
    return getattr(model, "all_tied_weights_keys", None) or {}
