"""Digests of what the result of a run depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from autoround_modifier.host.layers import disable_onloading
from autoround_modifier.runs.calibration_data import calibration_digest, calibration_size
from autoround_modifier.runs.sources import source_digest
from autoround_modifier.version import __version__

__all__ = [
    "DATA",
    "MODEL",
    "RECIPE",
    "Described",
    "model_digest",
    "run_description",
    "run_digests",
    "text_digest",
]

# What a run is about, as `run_digests` and messages name it
RECIPE, MODEL, DATA = "recipe", "model", "calibration data"

# For each of these, what can be said of it in a message: JSON values by name
Described = dict[str, dict[str, Any]]


SAMPLED_ELEMENTS = 2**14
QPARAM_SUFFIXES = ("_scale", "_zero_point", "_g_idx")
# Fields of recipes that do not change the result.
WITHOUT_EFFECT = ("checkpoint_dir", "enable_torch_compile", "engine", "mtp", "offload_device")
# The code that computes integers and scales. The rest of the package (lifecycle, messages, files)
# may change between two halves of a run.
COMPUTING_ROOMS = ("activations", "blocks", "formats", "search", "tuning")


def run_digests(
    model: nn.Module, modifier: Any, modifiers: list[Any], batches: object = None
) -> dict[str, str]:
    """
    :param modifier: that tunes; a pydantic model
    :param modifiers: of the recipe, the one that tunes among them
    :param batches: calibration data, see `calibration_digest`
    :return: digests of all that the result depends on, each under the name of what it is a digest
        of
    """
    recipe = _recipe(modifiers)
    return {
        "version of autoround_modifier": __version__,
        "code of autoround_modifier": source_digest(*COMPUTING_ROOMS),
        RECIPE: text_digest(recipe),
        # two modifiers of one recipe need a folder each
        "modifier of the recipe": str([x is modifier for x in modifiers].index(True)),
        MODEL: model_digest(model),
        DATA: calibration_digest(batches),
    }


def run_description(model: nn.Module, modifiers: list[Any], batches: object = None) -> Described:
    """
    :param modifiers: of the recipe
    :param batches: calibration data
    :return: what the digests are of, so that a message can say how two runs differ
    """
    several = len(modifiers) > 1
    parameters = [parameter for _, parameter in _parameters(model)]
    return {
        RECIPE: {
            (f"{number + 1}. {name}.{field}" if several else field): value
            for number, (name, fields) in enumerate(_recipe(modifiers))
            for field, value in fields.items()
        },
        MODEL: {
            "class": _class_name(model),
            "parameters": sum(x.numel() for x in parameters),
            "dtypes": sorted({str(x.dtype).removeprefix("torch.") for x in parameters}),
        },
        DATA: {"batches": calibration_size(batches)},
    }


def _recipe(modifiers: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """:return: class and fields of each modifier, without those that do not change the result"""
    recipe = [
        (type(x).__name__, x.model_dump(mode="json", fallback=_class_name)) for x in modifiers
    ]
    for _, fields in recipe:
        for name in WITHOUT_EFFECT:
            fields.pop(name, None)
    return recipe


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """:return: names and parameters where they are kept, without those of quantization"""
    with disable_onloading():
        for module_name, module in model.named_modules():
            for name, tensor in module.named_parameters(recurse=False):
                if not _of_another_modifier(module, name):
                    yield f"{module_name}.{name}", tensor


def _of_another_modifier(module: nn.Module, name: str) -> bool:
    """:return: whether a parameter is a scale or the like, not filled in yet"""
    return name.endswith(QPARAM_SUFFIXES) and hasattr(module, "quantization_scheme")


def _class_name(value: object) -> str:
    return type(value).__name__


def text_digest(value: Any) -> str:
    """:return: of a JSON value"""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def model_digest(model: nn.Module) -> str:
    """
    Of the names, shapes and dtypes of all parameters, and of up to 16,384 numbers of each, evenly
    spaced: reading 671B in full would take as long as tuning several blocks. What is not read shows
    in the outputs of the blocks (`block_data`).
    """
    digest = hashlib.blake2b(digest_size=16)
    for module_name, module in model.named_modules():
        for name in module._parameters:
            if _of_another_modifier(module, name):
                continue
            tensor = getattr(module, name)  # onloads an offloaded one
            if tensor is None:
                continue
            flat = tensor.detach().reshape(-1)
            stride = max(1, flat.numel() // SAMPLED_ELEMENTS)
            sample = flat[::stride].contiguous().cpu().view(torch.uint8).numpy()
            digest.update(f"{module_name}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.data)
    return digest.hexdigest()
