"""A saved compressed-tensors checkpoint as integers, scales and zero points, file by file."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from autoround_modifier.checkpoints.contents import refuse_other_formats
from autoround_modifier.checkpoints.saved_files import opened, read_layout, tensor_files
from autoround_modifier.checkpoints.saved_layers import EMBEDDINGS, HEADS
from autoround_modifier.checkpoints.saved_weights import SavedWeights
from autoround_modifier.engines.config_names import EXPERT
from autoround_modifier.engines.scheme import Scheme
from autoround_modifier.errors import ExportError, listed
from autoround_modifier.host.schemes import QuantizationScheme, QuantizationType

__all__ = ["FOR_GGUF", "IntegerCheckpoint", "IntegerLayer", "IntegerSpec", "kind_of"]

# Families of `Scheme` that GGUF holds as well: weights alone are quantized, to 4 bits
FOR_GGUF = ("mxfp4a16", "nvfp4a16")


@dataclass(frozen=True)
class IntegerSpec:
    """
    :ivar name: of a quantized layer, as in the files
    :ivar out_features: rows of its weight
    :ivar in_features: columns of its weight
    :ivar num_bits: of an integer
    :ivar symmetric: whether it has no zero points
    :ivar group_size: input features that share a scale; -1 where a whole row does
    :ivar kind: ``linear``, ``expert``, ``embedding`` or ``head``
    """

    name: str
    out_features: int
    in_features: int
    num_bits: int
    symmetric: bool
    group_size: int
    kind: str

    @property
    def label(self) -> str:
        """Such as ``W2A16 G64`` or ``W8A16 asym channel``."""
        strategy = "channel" if self.group_size == -1 else "group"
        return Scheme("int", self.num_bits, self.symmetric, self.group_size, strategy).label

    @property
    def features_per_scale(self) -> int:
        return self.in_features if self.group_size == -1 else self.group_size


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
        self._refuse_what_is_not_integers(schemes)
        self.float_families = {
            name: _family(scheme)
            for name, scheme in schemes.items()
            if _family(scheme) in self.floats
        }
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
        return [
            name.removesuffix(".weight")
            for name, tensor in self.tensors.items()
            if name.endswith(".weight")
            and len(tensor.shape) == 2
            and name.removesuffix(".weight") not in self.quantized
            and not EMBEDDINGS.fullmatch(name.removesuffix(".weight"))
        ]

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
        """:return: (out_features, groups), as saved"""
        return self.tensor(f"{name}.weight_scale")

    def tensor(self, name: str) -> Tensor:
        """
        :raises CheckpointError: if it cannot be read
        """
        with opened(self._files[name]) as file:
            return file.get_tensor(name)

    def _spec(self, name: str, scheme: QuantizationScheme) -> IntegerSpec:
        weights = scheme.weights
        assert weights is not None
        if f"{name}.weight_shape" in self.tensors:
            rows, columns = self.tensor(f"{name}.weight_shape").tolist()
        else:
            rows, columns = self.tensors[f"{name}.weight"].shape
        by_group = str(getattr(weights.strategy, "value", weights.strategy)) == "group"
        return IntegerSpec(
            name=name,
            out_features=rows,
            in_features=columns,
            num_bits=weights.num_bits,
            symmetric=bool(weights.symmetric),
            group_size=int(weights.group_size or -1) if by_group else -1,
            kind=kind_of(name),
        )

    def _refuse_what_is_not_integers(self, schemes: dict[str, QuantizationScheme]) -> None:
        """:raises ExportError: naming the layers and what is quantized in them"""
        found: dict[str, list[str]] = {}
        for name, scheme in schemes.items():
            reason = self._not_integers(name, scheme)
            if reason is not None:
                found.setdefault(reason, []).append(name)
        quantization = self.config["quantization_config"]
        caches = [name for name in self.tensors if name.endswith((".k_scale", ".v_scale"))]
        if quantization.get("kv_cache_scheme") or caches:
            found["the key-value cache is quantized"] = caches or ["kv_cache_scheme"]
        if quantization.get("transform_config"):
            found["weights are rotated while the model runs"] = ["transform_config"]
        if (quantization.get("sparsity_config") or {}).get("format") not in (None, "dense"):
            found["weights are stored sparsely"] = ["sparsity_config"]
        if found:
            reasons = [f"{reason}: {listed(names)}" for reason, names in found.items()]
            raise ExportError(
                f"{self.folder} is more than integers of weights, which alone can be exported to "
                "this format; it can stay in compressed-tensors.\n  " + "\n  ".join(reasons)
            )

    def _not_integers(self, name: str, scheme: QuantizationScheme) -> str | None:
        weights = scheme.weights
        assert weights is not None
        if _family(scheme) in self.floats:
            return None
        if weights.type != QuantizationType.INT:
            elsewhere = "; GGUF holds it (`gguf:auto`)" if _family(scheme) in FOR_GGUF else ""
            return f"{_label(scheme)} is no integer format{elsewhere}"
        if scheme.input_activations is not None or scheme.output_activations is not None:
            return f"{_label(scheme)} quantizes activations"
        if f"{name}.weight_g_idx" in self.tensors:
            return "columns are in the order of their activations (`actorder`)"
        return None


def kind_of(name: str) -> str:
    """
    :param name: of a layer
    :return: ``linear``, ``expert``, ``embedding`` or ``head``
    """
    if EXPERT.search(name):
        return "expert"
    if EMBEDDINGS.fullmatch(name):
        return "embedding"
    return "head" if name.rpartition(".")[2] in HEADS else "linear"


def _family(scheme: QuantizationScheme) -> str:
    """:return: one of `FAMILIES`"""
    found = Scheme.of_group(scheme.model_dump(mode="json"))
    return "other" if found is None else found.family


def _label(scheme: QuantizationScheme) -> str:
    """:return: such as ``W8A8 sym channel dynamic`` or ``NVFP4``"""
    found = Scheme.of_group(scheme.model_dump(mode="json"))
    return "weights" if found is None else found.label
