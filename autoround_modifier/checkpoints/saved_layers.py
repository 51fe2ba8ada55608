"""The layers that a checkpoint holds, with their schemes and sizes. No weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoround_modifier.checkpoints.saved_files import opened, tensor_files
from autoround_modifier.engines.config_names import EXPERT, HEADS
from autoround_modifier.engines.layout import CheckpointLayout, TensorLayout
from autoround_modifier.engines.matching import Names, Targets, groups_of
from autoround_modifier.engines.name_expressions import NUMBER
from autoround_modifier.engines.scheme import Scheme

__all__ = ["SavedLayer", "saved_layers", "tensor_bytes"]

EMBEDDINGS = re.compile(r"(^|.*\.)(\w*embed\w*|wte|wpe|shared)(\.\w*embed\w*)?")
# Names of what compressed-tensors saves in place of a weight, or beside it
WEIGHTS = ("weight_packed", "weight")
PARTS = re.compile(
    r"weight(_packed|_scale|_zero_point|_global_scale|_shape|_g_idx)?"
    r"|input_(scale|zero_point|global_scale)"
)
CACHE_SCALE = re.compile(r"[kvq]_(scale|zero_point)")


@dataclass(frozen=True)
class SavedLayer:
    """
    A layer, or a tensor that is no part of one, such as a bias.

    :param kind: last part of its name, such as ``q_proj``; ``experts``, ``embeddings``,
        ``lm_head``, ``norms``, ``biases``, ``key-value cache scales`` or ``others``
    :param scheme: None where it is not quantized
    :param dtype: of its weight in the file
    :param weights: numbers in it, before packing
    :param bytes: of its weight, scales and zero points
    :param is_matrix: whether its weight has two dimensions or more
    :param shape: of its weight before packing
    """

    name: str
    kind: str
    scheme: Scheme | None
    dtype: str
    weights: int
    bytes: int
    is_matrix: bool
    shape: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """Of its scheme; its dtype where it is not quantized."""
        return self.dtype if self.scheme is None else self.scheme.label


def _saved_shapes(folder: Path, layout: CheckpointLayout) -> dict[str, tuple[int, ...]]:
    """
    One is read for layers whose names differ in numbers alone and whose packed weights have one
    shape, such as all experts.

    :return: layer -> shape of its weight before packing, of those that are packed
    """
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in layout.tensors:
        layer, found, _ = name.partition(".weight_shape")
        if found:
            packed = layout.tensors.get(f"{layer}.weight_packed")
            key = (NUMBER.sub("*", layer), packed.shape if packed else ())
            alike.setdefault(key, []).append(layer)
    files, shapes = tensor_files(folder), {}
    for layers in alike.values():
        name = f"{layers[0]}.weight_shape"
        with opened(files[name]) as file:
            shape = tuple(int(size) for size in file.get_tensor(name).tolist())
        shapes.update(dict.fromkeys(layers, shape))
    return shapes


def saved_layers(
    folder: Path, layout: CheckpointLayout, quantization: Mapping[str, Any], notes: list[str]
) -> Iterator[SavedLayer]:
    """
    Yield all that the files hold: each layer with its scales, and each bias and other tensor.

    :param folder: of the checkpoint
    :param layout: of its tensors
    :param quantization: section of its config
    :param notes: to which is added what is odd
    :raises CheckpointError: if a file cannot be read
    """
    shapes = _saved_shapes(folder, layout)
    parts: dict[str, dict[str, TensorLayout]] = {}
    for name, tensor in layout.tensors.items():
        owner, _, part = name.rpartition(".")
        if PARTS.fullmatch(part):
            parts.setdefault(owner, {})[part] = tensor
        else:
            yield _other_tensor(name, part, tensor)
    schemes = _Schemes(quantization, notes)
    for name, tensors in parts.items():
        weight = next((tensors[x] for x in WEIGHTS if x in tensors), None)
        size = sum(tensor_bytes(tensor) for tensor in tensors.values())
        if weight is None:
            yield SavedLayer(name, "others", None, "scales", 0, size, False)
            continue
        scheme = schemes.of(name) if _is_quantized(tensors) else None
        shape = shapes.get(name) or _shape(weight, scheme, "weight_packed" in tensors)
        is_matrix = len(shape) > 1
        kind = _kind(name, is_matrix)
        yield SavedLayer(
            name, kind, scheme, _dtype(weight), math.prod(shape), size, is_matrix, tuple(shape)
        )


def _other_tensor(name: str, part: str, tensor: TensorLayout) -> SavedLayer:
    """:return: a tensor that is neither a weight nor beside one"""
    dtype, size, count = _dtype(tensor), tensor_bytes(tensor), math.prod(tensor.shape)
    if CACHE_SCALE.fullmatch(part):
        return SavedLayer(name, "key-value cache scales", None, dtype, 0, size, False)
    if part.endswith("bias"):
        return SavedLayer(name, "biases", None, dtype, count, size, False)
    is_matrix = len(tensor.shape) > 1
    kind = "experts" if is_matrix and ".experts." in name else "others"
    return SavedLayer(name, kind, None, dtype, count, size, is_matrix)


class _Schemes:
    """
    Finds the scheme of a layer that is quantized.

    :param notes: to which layers are added that no config group targets
    """

    def __init__(self, quantization: Mapping[str, Any], notes: list[str]):
        found = quantization.get("config_groups") or {}
        general = quantization.get("format")
        self._schemes = {name: Scheme.of_group(group, general) for name, group in found.items()}
        self._targets = Targets(groups_of(quantization))
        self._ignore = Names(quantization.get("ignore") or [])
        self._notes = notes

    def of(self, name: str) -> Scheme:
        """:return: that of the group that targets the layer; of an unknown family if none does"""
        kinds = ("Embedding", "Linear") if EMBEDDINGS.fullmatch(name) else ("Linear", "Embedding")
        found = (self._targets.compressed_tensors(name, kind) for kind in kinds)
        group = next((group for group in found if group is not None), None)
        if group is None and len(self._schemes) == 1:
            group = next(iter(self._schemes))
        scheme = None if group is None else self._schemes[group]
        if scheme is None:
            shown = NUMBER.sub("*", name)
            self._notes.append(f"no config group targets {shown}, which is quantized")
            return Scheme("other", 0)
        if name in self._ignore:
            self._notes.append(f"{NUMBER.sub('*', name)} is quantized, and is in `ignore`")
        return scheme


def _is_quantized(tensors: Mapping[str, TensorLayout]) -> bool:
    return "weight_packed" in tensors or "weight_scale" in tensors


def _shape(weight: TensorLayout, scheme: Scheme | None, packed: bool) -> tuple[int, ...]:
    """:return: of a weight before packing, where the files do not say it"""
    if not packed or scheme is None:
        return weight.shape
    bits = 8 * weight.dtype.itemsize
    return (*weight.shape[:-1], weight.shape[-1] * bits // (scheme.num_bits or bits))


def _kind(name: str, is_matrix: bool) -> str:
    leaf = name.rpartition(".")[2]
    if EXPERT.search(name) or (".experts." in f".{name}." and is_matrix):
        return "experts"
    if leaf in HEADS:
        return "lm_head"
    if EMBEDDINGS.fullmatch(name) and is_matrix:
        return "embeddings"
    if not is_matrix and ("norm" in leaf or leaf.startswith("ln") or not leaf.isidentifier()):
        return "norms"
    if leaf.isdigit():  # of a sequence of layers
        return ".".join(name.split(".")[-2:])
    return leaf if is_matrix else "norms" if "norm" in name else "others"


def tensor_bytes(tensor: TensorLayout) -> int:
    """:return: its size in the file"""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _dtype(tensor: TensorLayout) -> str:
    return str(tensor.dtype).removeprefix("torch.")
