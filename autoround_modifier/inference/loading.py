"""Loads a saved checkpoint for people in Python, with its weights packed in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from loguru import logger
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from autoround_modifier.checkpoints.saved_weights import dtype_named
from autoround_modifier.errors import BackendError, HubError
from autoround_modifier.host.loading import (
    DEQUANTIZED_FORMATS,
    auto_class,
    load_model,
    source_config,
    stored_format,
)
from autoround_modifier.hub import resolve_model
from autoround_modifier.inference.backends import TRANSFORMERS, Backend, Use
from autoround_modifier.inference.choice import (
    AUTO,
    check_backend,
    choose,
    default_device,
    in_words,
)
from autoround_modifier.inference.packed_layer import PackedEmbedding, PackedLinear
from autoround_modifier.inference.packed_weight import PackedWeight
from autoround_modifier.inference.reading import NotPackedError, packed_layers, read_weights
from autoround_modifier.inference.skeleton import kind_of, load_skeleton

__all__ = ["load"]

DTYPES = ("auto", "bfloat16", "float16", "float32")
FILES = ("*.json", "*.safetensors", "*.py", "*.txt", "*.model", "*.jinja")


def load(
    checkpoint: str | os.PathLike[str],
    backend: str = AUTO,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """
    Load a quantized checkpoint to run it. Weights that are packed in the files stay packed in
    memory: they are read and handed to a kernel one after the other, and the whole model is never
    unpacked. Transformers itself unpacks all of them to 16 bits.

    What is not stored as packed integers (FP8, MXFP4, NVFP4, quantized activations, other formats,
    no quantization at all) is loaded as Transformers loads it, and a warning says so.

    :param checkpoint: folder, or name on the hub, of a checkpoint of `quantize` or of anybody else
    :param backend: what runs the quantized layers: ``auto`` for the best that is installed, layer
        by layer; ``gptqmodel``; ``ark``, the CPU kernel of auto-round; ``torch-int4``, PyTorch's
        CPU kernel; ``torch``, which unpacks a layer whenever it is used; or ``transformers``
    :param device: of the model; None for the accelerator, if there is one
    :param dtype: to compute in; None for that of the checkpoint
    :param revision: on the hub; None for the newest
    :param trust_remote_code: let a model run its own code
    :return: a model to generate with. It cannot be saved or trained
    :raises BackendError: if there is no such backend or dtype, the backend is not installed, or it
        does not run a layer of the checkpoint
    :raises CheckpointError: if the checkpoint cannot be read, or lacks tensors
    :raises HubError: if there is no such folder or name, or it cannot be downloaded
    """
    place = default_device() if device is None else torch.device(device)
    check_backend(backend, place)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise BackendError(f"`{dtype}` is no dtype to compute in; use one of {', '.join(DTYPES)}")
    folder = _folder(checkpoint, revision)
    if backend == TRANSFORMERS:
        return _load_by_transformers(folder, place, dtype, trust_remote_code)
    try:
        return _load_packed(folder, backend, place, dtype, trust_remote_code)
    except NotPackedError as error:
        if backend != AUTO:
            raise BackendError(
                f"the backend `{backend}` runs packed integer weights, and {folder} has others: "
                f"{error}. The backend `{TRANSFORMERS}` loads it unpacked, as `{AUTO}` would."
            ) from error
        logger.warning(f"{folder} is loaded by Transformers, which keeps nothing packed: {error}")
    return _load_by_transformers(folder, place, dtype, trust_remote_code)


def _load_packed(
    folder: Path,
    backend: str,
    device: torch.device,
    dtype: str | torch.dtype | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """:raises NotPackedError: if the weights cannot stay packed"""
    specs = packed_layers(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    stored = getattr(config, "dtype", None) or config.get_text_config().dtype
    kind = dtype_named(stored if dtype in (None, "auto") else dtype)
    expected = {name: Use(spec, "linear", device, kind) for name, spec in specs.items()}
    choose(backend, expected)  # refuses before anything is read
    model, found = load_skeleton(str(folder), specs, config, device, kind, trust_remote_code)
    uses = {
        path: Use(spec, kind_of(model.get_submodule(path)), device, kind)
        for path, spec in found.items()
    }
    chosen = choose(backend, uses)
    paths = {spec.name: path for path, spec in found.items()}
    for weight in read_weights(folder, found.values()):
        path = paths[weight.spec.name]
        _place(model, path, weight.to(device), chosen[path], kind)
    for one in dict.fromkeys(chosen.values()):
        if one.finish is not None:
            one.finish(model)
    logger.info(f"{folder}: {in_words(chosen)}")
    unused = specs.keys() - paths.keys()
    if unused:
        logger.info(f"{folder}: {len(unused)} quantized layers are no part of the model that runs")
    return model.eval()


def _place(
    model: nn.Module, path: str, weight: PackedWeight, backend: Backend, dtype: torch.dtype
) -> None:
    """Give a layer its weight, or put another in its place."""
    layer = model.get_submodule(path)
    assert isinstance(layer, (PackedLinear, PackedEmbedding))
    if backend.build is None:
        layer.take(weight, dtype)
    else:
        bias = getattr(layer, "bias", None)
        model.set_submodule(path, backend.build(weight, bias, dtype).eval())


def _load_by_transformers(
    folder: Path,
    device: torch.device,
    dtype: str | torch.dtype | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    config = source_config(folder)
    arguments: dict[str, Any] = {
        "dtype": "auto" if dtype is None else dtype,
        "trust_remote_code": trust_remote_code,
    }
    if device.type != "cpu":
        arguments["device_map"] = {"": device}
    if stored_format(config, folder) in DEQUANTIZED_FORMATS:
        return load_model(folder, **arguments).eval()
    return auto_class(config).from_pretrained(folder, **arguments).eval()


def _folder(checkpoint: str | os.PathLike[str], revision: str | None) -> Path:
    """
    :return: where it is on this machine
    :raises HubError: if it is not there and cannot be downloaded
    """
    name = resolve_model(checkpoint, revision=revision)
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # of many kinds, by what is missing
        raise HubError(
            f"there is no folder `{name}`, and no such model was found: {error}"
        ) from error
