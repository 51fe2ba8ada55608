"""A saved compressed-tensors checkpoint as integers, scales and zero points, file by file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from autoround_modifier.checkpoints.contents import refuse_other_formats
from autoround_modifier.checkpoints.saved_files import opened, read_layout, tensor_files
from autoround_modifier.checkpoints.saved_weights import SavedWeights
from autoround_modifier.exports.integer_specs import (
    FOR_GGUF,
    IntegerSpec,
    check_integers,
    family_of,
    integer_spec,
    kind_of,
    unquantized_layers,
)
from autoround_modifier.host.schemes import QuantizationScheme

__all__ = ["FOR_GGUF", "IntegerCheckpoint", "IntegerLayer", "IntegerSpec", "kind_of"]

SMALLEST_FLOAT16 = 2.0**-24  # above zero


@dataclass(frozen=True)
class IntegerLayer:
    """
    ``weight = scale * (codes - zero_point)``, each scale and zero point for its group of columns.

    :ivar spec: how it is quantized
    :ivar codes: (out_features, in_features), uint8, 0 to ``2 ** num_bits - 1``
    :ivar scale: (out_features, groups), in the dtype of the file; may be negative
    :ivar zero_point: (out_features, groups), uint8; ``2 ** (num_bits - 1)`` if symmetric
    """

    spec: IntegerSpec
    codes: Tensor
    scale: Tensor
    zero_point: Tensor


class IntegerCheckpoint:
    """
    Nothing but headers is read until a layer or a tensor is asked for.

    :param folder: of a checkpoint in a format of compressed-tensors
    :raises CheckpointError: if it is none, or a file cannot be read
    :raises ExportError: if anything in it is quantized that is not the weight of a layer, to
        integers; see `floats`
    :cvar floats: families of `Scheme` that are left to a subclass
    """

    floats: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: Path):
        refuse_other_formats(folder)
        self.folder = folder
        self._weights = SavedWeights(folder)
        layout = read_layout(folder)
        self.config: dict[str, Any] = dict(layout.config)
        self.tensors = layout.tensors
        self._files = tensor_files(folder)
        schemes = {name: self._weights.scheme(name, layout.tensors) for name in self._weights}
        check_integers(str(folder), layout, schemes, self.floats)
        families = {name: family_of(scheme) for name, scheme in schemes.items() if self.floats}
        self.float_families = {name: x for name, x in families.items() if x in self.floats}
        self.specs = {
            name: self._spec(name, scheme)
            for name, scheme in schemes.items()
            if name not in self.float_families
        }

    @property
    def quantized(self) -> Collection[str]:
        """Names of quantized layers."""
        return self._weights.keys()

    @property
    def unquantized_layers(self) -> list[str]:
        """Names of layers with a matrix for weight that are not quantized, embeddings left out."""
        return unquantized_layers(self.tensors, self.quantized)

    def files(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Yield of each file its name, the quantized layers in it, and its other tensors."""
        taken = {
            f"{name}.{part}": name for name in self._weights for part in self._weights.parts(name)
        }
        by_file: dict[str, tuple[list[str], list[str]]] = {}
        for tensor, path in self._files.items():
            layers, others = by_file.setdefault(path.name, ([], []))
            if tensor not in taken:
                others.append(tensor)
            elif tensor.endswith((".weight", ".weight_packed")):
                layers.append(taken[tensor])
        for file in sorted(by_file):
            yield (file, *by_file[file])

    def layer(self, name: str) -> IntegerLayer:
        """
        :raises CheckpointError: if it cannot be read
        """
        saved, spec = self._weights[name], self.specs[name]
        offset = 2 ** (spec.num_bits - 1)
        return IntegerLayer(
            spec,
            (saved.values.to(torch.int16) + offset).to(torch.uint8),
            saved.scale,
            (saved.zero_point.to(torch.int16) + offset).to(torch.uint8),
        )

    def scale(self, name: str) -> Tensor:
        """
        :return: (out_features, groups), as saved; 0 where all weights of a group are zero, which
            they are with any scale, if float16 has no number as small
        """
        scale = self.tensor(f"{name}.weight_scale")
        if name not in self.specs:
            return scale
        small = scale.abs() < SMALLEST_FLOAT16
        if not small.any():
            return scale
        layer, size = self.layer(name), self.specs[name].features_per_scale
        zero = layer.codes == layer.zero_point.repeat_interleave(size, 1)
        unused = zero.reshape(*scale.shape, size).all(-1)
        return torch.where(small & unused, torch.zeros_like(scale), scale)

    def tensor(self, name: str) -> Tensor:
        """
        :raises CheckpointError: if it cannot be read
        """
        with opened(self._files[name]) as file:
            return file.get_tensor(name)

    def _spec(self, name: str, scheme: QuantizationScheme) -> IntegerSpec:
        assert scheme.weights is not None
        weight = self.tensors.get(f"{name}.weight")
        shape: Sequence[int] = (
            self.tensor(f"{name}.weight_shape").tolist() if weight is None else weight.shape
        )
        return integer_spec(name, shape, scheme.weights)
