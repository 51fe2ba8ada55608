"""
Layers whose parameters may be offloaded to the CPU or to the disk.

Reading ``layer.weight`` of an offloaded layer copies it to the execution device each time;
what is asked of shapes and identities must not do that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from compressed_tensors.offload import (
    as_single_threaded,
    disable_offloading,
    disable_onloading,
    get_execution_device,
    update_offload_parameter,
)
from compressed_tensors.offload.cache import DiskCache, OffloadCache
from torch import Tensor, nn

__all__ = [
    "Layer",
    "as_single_threaded",
    "disable_offloading",
    "disable_onloading",
    "get_execution_device",
    "is_on_disk",
    "kept_onloaded",
    "offloaded_bytes",
    "parameters_frozen",
    "stored_parameters",
    "stored_weight",
    "weight_folders",
    "write_parameter",
]

Layer = nn.Linear | nn.Embedding


def stored_weight(layer: Layer) -> Tensor:
    """:return: the weight where it is kept, without moving it; for its shape, dtype or identity"""
    with disable_onloading():
        return layer.weight


def stored_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """:return: all parameters of modules where they are kept, without moving them"""
    with disable_onloading():
        return [parameter for module in modules for parameter in module.parameters()]


def write_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer, and its offloaded copy if there is one."""
    update_offload_parameter(module, name, value)


def offloaded_bytes(model: nn.Module) -> dict[torch.device, int]:
    """
    :return: by device, the bytes of parameters that are kept elsewhere, and are brought to it when
        they are used
    """
    sizes: dict[torch.device, dict[int, int]] = {}
    with disable_onloading():
        for module in model.modules():
            cache = module._parameters
            if isinstance(cache, OffloadCache):
                device = torch.device(cache.onload_device)
                kept_on = str(cache.offload_device)
                if kept_on.partition(":")[0] != device.type:
                    found = {id(x): x.nbytes for x in module.parameters(recurse=False)}
                    sizes.setdefault(device, {}).update(found)
    return {device: sum(found.values()) for device, found in sizes.items()}


@contextlib.contextmanager
def kept_onloaded(parameters: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """
    Keep some offloaded parameters on the device: the forward pass sees the same tensor each time.

    :param parameters: modules and the names of their parameters
    """
    kept = []
    for module, name in parameters:
        with disable_onloading():
            stored = getattr(module, name)
        onloaded = getattr(module, name)
        if onloaded is not stored and stored not in OffloadCache.keep_onloaded_values:
            OffloadCache.keep_onloaded_values[stored] = onloaded
            kept.append(stored)
    try:
        yield
    finally:
        for stored in kept:
            OffloadCache.keep_onloaded_values.pop(stored, None)


def is_on_disk(model: nn.Module) -> bool:
    """:return: whether a parameter of the model is offloaded to the disk"""
    return any(isinstance(module._parameters, DiskCache) for module in model.modules())


def weight_folders(model: nn.Module) -> set[Path]:
    """
    :return: folders of the files from which weights on the disk are read; where the offload folder
        holds a link to a file of the original checkpoint, that of the original
    """
    with disable_onloading():
        stored = [p for module in model.modules() for p in module.parameters(recurse=False)]
    files = [DiskCache.index[p]["safetensors_file"] for p in stored if p in DiskCache.index]
    return {Path(file).resolve().parent for file in files}


@contextlib.contextmanager
def parameters_frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """
    No gradients for the parameters of these modules. Of offloaded ones, copies that are brought to
    the device from now on take ``requires_grad`` from what is kept; copies that stay on the device
    (`disable_offloading`), from before or from now on, are frozen too, and trainable afterwards.
    """
    stored = [parameter for parameter in stored_parameters(modules) if parameter.requires_grad]
    try:
        _set_trainable(stored, False)
        yield
    finally:
        _set_trainable(stored, True)


def _set_trainable(stored: list[nn.Parameter], trainable: bool) -> None:
    for parameter in stored:
        parameter.requires_grad_(trainable)
        copy = OffloadCache.keep_onloaded_values.get(parameter)
        if copy is not None:
            copy.requires_grad_(trainable)
