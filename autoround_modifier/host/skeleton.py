"""A model without its weights: the same modules on the meta device."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from compressed_tensors.offload import disable_onloading
from torch import Tensor, nn

__all__ = ["skeleton"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def skeleton(model: nn.Module) -> nn.Module:
    """
    Nothing is moved, and changes of the copy leave the model as it is. The copy is not made to run.

    :param model: may be offloaded
    :return: a model of the same modules, names and attributes, without hooks, whose parameters and
        buffers are on the meta device; what is shared in the model is shared in the copy
    """
    with disable_onloading():
        return _copied(model, {})


def _copied(module: nn.Module, done: dict[int, object]) -> nn.Module:
    """:param done: copies of modules and tensors, by the identity of the original"""
    found = done.get(id(module))
    if found is not None:
        assert isinstance(found, nn.Module)
        return found
    result = done[id(module)] = module.__class__.__new__(module.__class__)
    attributes = dict(module.__dict__)
    attributes.pop("save_pretrained", None)  # a method of the original, put there by the host
    for name in _HOOKS:
        if name in attributes:
            attributes[name] = OrderedDict()
    for name in ("_parameters", "_buffers"):
        attributes[name] = {x: _on_meta(y, done) for x, y in dict(attributes[name]).items()}
    attributes["_modules"] = {
        name: None if child is None else _copied(child, done)
        for name, child in module._modules.items()
    }
    for name in ("config", "quantization_scheme"):
        if name in attributes:
            attributes[name] = copy.deepcopy(attributes[name])
    result.__dict__.update(attributes)
    return result


def _on_meta(tensor: Tensor | None, done: dict[int, object]) -> Tensor | None:
    if tensor is None:
        return None
    found = done.get(id(tensor))
    if found is None:
        found = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            found = nn.Parameter(found, requires_grad=False)
        done[id(tensor)] = found
    assert isinstance(found, Tensor)
    return found
