"""A model made of its configuration alone, on the meta device: names and shapes, no weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from llmcompressor.modeling.moe.helpers import FusedExpertsProtocol, MoEConfig
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from autoround_modifier.errors import RecipeError
from autoround_modifier.host.experts import LinearExperts2D
from autoround_modifier.host.loading import auto_class

__all__ = ["NUM_EXPERTS", "EmptyModel", "empty_model", "split_experts"]

# Fields of configurations that hold the number of experts, as LLM-Compressor looks for them
NUM_EXPERTS = ("num_local_experts", "moe_num_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class EmptyModel:
    """
    :ivar model: on the meta device
    :ivar num_experts: of each mixture that has linear layers for one expert only, which stands for
        all of them: name of the module -> how many there are
    """

    model: PreTrainedModel
    num_experts: dict[str, int]

    def copies(self, name: str) -> int:
        """
        :param name: of a module or tensor of the model
        :return: how many the real model has in its place
        """
        for experts, count in self.num_experts.items():
            if name.startswith(f"{experts}."):
                return count
        return 1


def empty_model(
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
    all_experts: bool = False,
) -> EmptyModel:
    """
    The modules are those of `load_model`: experts are linear layers. The experts of a mixture have
    one shape, so one of them is made, which takes a fraction of the time.

    :param config: of any model of `AutoModelForCausalLM` or `AutoModelForImageTextToText`
    :param dtype: of the weights
    :param trust_remote_code: let a model run its own code
    :param all_experts: make all of them
    :raises RecipeError: if Transformers cannot build the model
    """
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):  # of a source that is dequantized
        part.__dict__.pop("quantization_config", None)
        part.dtype = dtype
    try:
        with torch.device("meta"):
            model = auto_class(config.to_dict()).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise RecipeError(
            f"Transformers cannot build a model of this config ({type(error).__name__}: {error})"
        ) from error
    _keep_in_float32(model)
    num_experts: dict[str, int] = {}
    for name, module in _fused_experts(model):
        count = _split(model, name, module, all_experts)
        if not all_experts:
            num_experts[name] = count
    return EmptyModel(model.eval(), num_experts)


def split_experts(model: PreTrainedModel, wanted: Callable[[str], bool]) -> None:
    """
    Give experts that are held in one tensor linear layers of their own.

    :param model: on the meta device; changed
    :param wanted: whether to do so, by the name of the module that holds all experts of a block
    """
    for name, module in _fused_experts(model):
        if wanted(name):
            _split(model, name, module, all_experts=True)


def _fused_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """
    :return: what LLM-Compressor's `get_non_linearized_moes` does. That parses the source of each
        module's class; here each class is parsed once
    """
    known: dict[tuple[type, tuple[str, ...]], bool] = {}
    found = []
    for name, module in model.named_modules():
        key = (type(module), tuple(module._parameters))
        if key not in known:
            known[key] = (
                isinstance(module, FusedExpertsProtocol)
                or LinearExperts2D.get_registration(type(module)) is not None
            )
        if known[key]:
            found.append((name, module))
    return found


def _split(model: PreTrainedModel, name: str, module: nn.Module, all_experts: bool) -> int:
    """
    Replace experts in one tensor by linear layers.

    :return: the number of experts
    """
    config = getattr(module, "config", model.config)
    kind = cast(Any, LinearExperts2D.get_linear_experts_cls(cast(Any, type(module))))
    count = getattr(module, "num_experts", None) or MoEConfig.from_config(config).num_experts
    with torch.device("meta"):
        if "expert_dim" in inspect.signature(kind).parameters:  # Llama 4
            fused, made = cast(Any, module), count if all_experts else 1
            text = config.get_text_config()
            split = kind(made, fused.hidden_size, fused.expert_dim, text)
        else:
            split = kind(config if all_experts else _with_one_expert(config))
    model.set_submodule(name, split.to(model.dtype))
    return int(cast(int, count))


def _with_one_expert(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        for field in NUM_EXPERTS:
            if hasattr(part, field):
                setattr(part, field, 1)
    return config


def _keep_in_float32(model: PreTrainedModel) -> None:
    """Give the tensors that Transformers loads in float32 that dtype."""
    named: set[str] = set()
    for fields in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        strict = fields.endswith("strict")
        if strict or model.dtype == torch.float16:
            named |= set(getattr(model, fields, None) or ())
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                parts = f"{path}.{key}".split(".")
                if tensor is None or not named.intersection(parts):
                    continue
                moved = tensor.to(torch.float32)
                kept = nn.Parameter(moved, requires_grad=False)
                cast(Any, tensors)[key] = kept if isinstance(tensor, nn.Parameter) else moved
