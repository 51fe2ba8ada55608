"""Quantized weights of a saved checkpoint, in any format of compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from autoround_modifier.errors import CheckpointError
from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.host.matching import match_targets
from autoround_modifier.host.packed import unpack_e2m1, unpack_integers
from autoround_modifier.host.schemes import QuantizationArgs, QuantizationConfig, weight_spec

__all__ = ["SavedWeights"]

# E8M0 (OCP Microscaling Formats v1.0, section 5.4.1): an exponent with this bias
E8M0_BIAS = 127


class SavedWeights(Mapping[str, QuantizedWeight]):
    """
    Layer names, as in the file, and their quantized weights. A weight is read when it is asked for.

    :param folder: of the checkpoint
    :raises CheckpointError: if it has no ``quantization_config`` of compressed-tensors
    """

    def __init__(self, folder: Path):
        self.folder = folder
        config = _read_config(folder)
        found = config.get("quantization_config") or {}
        if found.get("quant_method") != "compressed-tensors":
            raise CheckpointError(
                f"{folder}: its config.json has no `quantization_config` of compressed-tensors"
            )
        name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        self._dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
        groups = QuantizationConfig.model_validate(found).config_groups.values()
        self._args = {
            target: scheme.weights
            for scheme in groups
            if scheme.weights
            for target in scheme.targets
        }
        self._files = _tensor_files(folder)
        self._layers = [
            name.removesuffix(".weight_scale")
            for name in self._files
            if name.endswith(".weight_scale")
        ]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __getitem__(self, name: str) -> QuantizedWeight:
        if f"{name}.weight_scale" not in self._files:
            raise KeyError(name)
        args = self._weight_args(name)
        spec = weight_spec(args)
        if f"{name}.weight_packed" in self._files:
            values = self._packed_values(name, args)
        else:
            values = self._tensor(name, "weight")
        scale = self._tensor(name, "weight_scale")
        scale_shape = spec.grouping(tuple(values.shape)).scale_shape
        zero_point = self._zero_point(name, args, scale_shape)
        if scale.dtype == torch.uint8:
            scale = torch.exp2(scale.float() - E8M0_BIAS)
        parts = {
            "values": values,
            "scale": scale.to(self._dtype).view(scale_shape),
            "zero_point": zero_point,
        }
        if f"{name}.weight_global_scale" in self._files:
            parts["global_scale"] = self._tensor(name, "weight_global_scale")
        return QuantizedWeight(parts, spec.grid(self._dtype), spec.grouping(tuple(values.shape)))

    def _weight_args(self, name: str) -> QuantizationArgs:
        """:raises CheckpointError: if no config group targets the layer"""
        matched = match_targets(name, nn.Linear(1, 1, device="meta"), list(self._args))
        if not matched:
            raise CheckpointError(
                f"{self.folder}: {name} is quantized, and no config group of its config.json "
                f"targets it ({', '.join(self._args)})"
            )
        return self._args[matched[0]]

    def _packed_values(self, name: str, args: QuantizationArgs) -> Tensor:
        packed = self._tensor(name, "weight_packed")
        if packed.dtype == torch.uint8:
            return unpack_e2m1(packed).to(torch.float8_e4m3fn)
        assert args.num_bits is not None
        shape = self._tensor(name, "weight_shape").tolist()
        return unpack_integers(packed, args.num_bits, tuple(shape))

    def _zero_point(self, name: str, args: QuantizationArgs, shape: tuple[int, ...]) -> Tensor:
        if f"{name}.weight_zero_point" not in self._files:
            return torch.zeros(shape, dtype=torch.int8)
        zero_point = self._tensor(name, "weight_zero_point")
        if zero_point.dtype == torch.int32:  # packed along the rows
            assert args.num_bits is not None
            zero_point = unpack_integers(zero_point, args.num_bits, shape, dim=0)
        return zero_point.to(torch.int8).view(shape)

    def _tensor(self, layer: str, part: str) -> Tensor:
        name = f"{layer}.{part}"
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """:return: tensor name -> file, of all safetensors files in the folder"""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files.update(dict.fromkeys(file.keys(), path))
    return files
