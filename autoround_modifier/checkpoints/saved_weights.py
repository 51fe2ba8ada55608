"""Quantized weights of a saved checkpoint, in any format of compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoround_modifier.checkpoints.saved_files import CONFIG, opened, read_json, tensor_files
from autoround_modifier.engines.layout import TensorLayout
from autoround_modifier.errors import CheckpointError, listed
from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.host.matching import match_targets
from autoround_modifier.host.quantized_weights import matches_saved_layer, read_saved_layer
from autoround_modifier.host.schemes import QuantizationConfig, QuantizationScheme

__all__ = ["SavedWeights", "dtype_named"]

SCALE = ".weight_scale"


class SavedWeights(Mapping[str, QuantizedWeight]):
    """
    Layer names, as in the files, and their quantized weights. A weight is read when it is asked
    for, with a `CheckpointError` if it cannot be, or if no config group describes it.

    :param folder: of the checkpoint
    :raises CheckpointError: if it is not a checkpoint in a format of compressed-tensors, or no
        weight in it is quantized
    """

    def __init__(self, folder: Path):
        self.folder = folder
        config = read_json(folder / CONFIG)
        found = config.get("quantization_config") or {}
        if found.get("quant_method") != "compressed-tensors":
            raise CheckpointError(
                f"{folder}: its config.json has no `quantization_config` of compressed-tensors"
            )
        try:
            groups = QuantizationConfig.model_validate(found).config_groups.values()
        except ValueError as error:
            raise CheckpointError(
                f"{folder}: the `quantization_config` of its config.json cannot be read: {error}"
            ) from error
        self._dtype = dtype_named(config.get("dtype") or config.get("torch_dtype"))
        self._schemes: dict[str, QuantizationScheme] = {
            target: scheme for scheme in groups if scheme.weights for target in scheme.targets
        }
        self._files = tensor_files(folder)
        names = (name.removesuffix(SCALE) for name in self._files if name.endswith(SCALE))
        self._parts: dict[str, list[str]] = {name: [] for name in names}
        for name in self._files:
            layer, _, part = name.rpartition(".")
            if layer in self._parts and part.startswith("weight"):
                self._parts[layer].append(part)
        if not self._parts:
            raise CheckpointError(f"{folder}: no weight of this checkpoint is quantized")

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __getitem__(self, name: str) -> QuantizedWeight:
        tensors = {part: self._tensor(f"{name}.{part}") for part in self._parts[name]}
        args = self._scheme(name, tensors).weights
        assert args is not None
        return read_saved_layer(tensors, args, self._dtype)

    def scheme(
        self, name: str, tensors: Mapping[str, TensorLayout], shape: Tensor | None = None
    ) -> QuantizationScheme:
        """
        No weight is read.

        :param name: of a layer
        :param tensors: all tensors of the checkpoint
        :param shape: its ``weight_shape``; None reads it, which opens a file
        :return: how it is quantized
        :raises CheckpointError: if no config group targets the layer and describes its tensors
        """
        found: dict[str, Tensor] = {}
        for part in self._parts[name]:
            full = f"{name}.{part}"
            layout = tensors[full]
            if part == "weight_shape":
                found[part] = self._tensor(full) if shape is None else shape
            else:
                found[part] = torch.empty(layout.shape, dtype=layout.dtype, device="meta")
        return self._scheme(name, found)

    def parts(self, name: str) -> tuple[str, ...]:
        """:return: last parts of the names of a layer's tensors: ``weight_packed``, ..."""
        return tuple(self._parts[name])

    def _scheme(self, name: str, tensors: dict[str, Tensor]) -> QuantizationScheme:
        """
        The files do not say which layers are embeddings, which a target may tell apart by class. So
        what the config says must also be what the tensors are.

        :raises CheckpointError: if no config group targets the layer and describes its tensors
        """
        targets = list(self._schemes)
        kinds = (nn.Linear(1, 1, device="meta"), nn.Embedding(1, 1, device="meta"))
        matched = [target for kind in kinds for target in match_targets(name, kind, targets)]
        for target in matched:
            scheme = self._schemes[target]
            if scheme.weights and matches_saved_layer(tensors, scheme.weights):
                return scheme
        seen = [f"{part} {tuple(x.shape)} {x.dtype}" for part, x in tensors.items()]
        raise CheckpointError(
            f"{self.folder}: {name} is quantized, and no config group of its config.json "
            f"describes it. Its tensors: {', '.join(seen)}; targets that match its name: "
            f"{listed(matched) or 'none'}"
        )

    def _tensor(self, name: str) -> Tensor:
        with opened(self._files[name]) as file:
            return file.get_tensor(name)


def dtype_named(name: Any) -> torch.dtype:
    """
    :param name: ``dtype`` of a model's config; None for bfloat16
    :raises CheckpointError: if PyTorch has no such dtype
    """
    dtype = getattr(torch, str(name or "bfloat16").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"config.json: `dtype` is {name}, which is no dtype of PyTorch")
    return dtype
