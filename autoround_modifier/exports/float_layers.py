"""A saved compressed-tensors checkpoint whose weights may be MXFP4 or NVFP4 as well as integers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoround_modifier.exports.integer_layers import FOR_GGUF, IntegerCheckpoint, kind_of

__all__ = ["FloatLayer", "FloatSpec", "WeightCheckpoint"]


@dataclass(frozen=True)
class FloatSpec:
    """
    :ivar name: of a quantized layer, as in the files
    :ivar out_features: rows of its weight
    :ivar in_features: columns of its weight
    :ivar numbers: ``mxfp4`` or ``nvfp4``
    :ivar kind: ``linear``, ``expert``, ``embedding`` or ``head``
    """

    name: str
    out_features: int
    in_features: int
    numbers: str
    kind: str

    @property
    def label(self) -> str:
        """``MXFP4`` or ``NVFP4``."""
        return self.numbers.upper()


@dataclass(frozen=True)
class FloatLayer:
    """
    :ivar spec: how it is quantized
    :ivar codes: (out_features, in_features), uint8: bits of E2M1
    :ivar scale: (out_features, groups), uint8: bits of E8M0 for groups of 32 (MXFP4), of E4M3 for
        groups of 16 (NVFP4)
    :ivar global_scale: by which all scales are divided; 1 for MXFP4
    """

    spec: FloatSpec
    codes: Tensor
    scale: Tensor
    global_scale: float


class WeightCheckpoint(IntegerCheckpoint):
    """
    :param folder: of a checkpoint in a format of compressed-tensors
    :raises CheckpointError: if it is none, or a file cannot be read
    :raises ExportError: if anything in it is quantized that is not the weight of a layer, to
        integers, MXFP4 or NVFP4
    """

    floats = FOR_GGUF

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.float_specs = {
            name: self._float_spec(name, family) for name, family in self.float_families.items()
        }

    def float_layer(self, name: str) -> FloatLayer:
        """
        :raises CheckpointError: if it cannot be read
        """
        packed = self.tensor(f"{name}.weight_packed")
        spec = self.float_specs[name]
        codes = torch.stack([packed & 15, packed >> 4], -1)
        return FloatLayer(
            spec,
            codes.reshape(spec.out_features, spec.in_features),
            self.scale(name).view(torch.uint8),
            self.global_scale(name),
        )

    def global_scale(self, name: str) -> float:
        """:return: by which all scales of a layer are divided; 1 for MXFP4"""
        if self.float_specs[name].numbers == "mxfp4":
            return 1.0
        return self.tensor(f"{name}.weight_global_scale").item()

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """
        :return: the dequantized weight, (out_features, in_features)
        :raises CheckpointError: if it cannot be read
        """
        if name in self.float_specs:
            return self._weights[name].dequantize().to(dtype)
        layer = self.layer(name)
        scale, zero_point = (
            x.float().repeat_interleave(layer.spec.features_per_scale, 1)
            for x in (layer.scale, layer.zero_point)
        )
        return (scale * (layer.codes.float() - zero_point)).to(dtype)

    def _float_spec(self, name: str, family: str) -> FloatSpec:
        rows, columns = self.tensors[f"{name}.weight_packed"].shape
        return FloatSpec(name, rows, 2 * columns, family.removesuffix("a16"), kind_of(name))
