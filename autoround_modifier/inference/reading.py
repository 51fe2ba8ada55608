"""Which weights of a checkpoint can stay packed, and their tensors, some layers at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from autoround_modifier.checkpoints.saved_config import (
    COMPRESSED_TENSORS,
    beside_weights,
    quantization_of,
)
from autoround_modifier.checkpoints.saved_files import (
    CONFIG,
    opened,
    read_json,
    read_layout,
    tensor_files,
)
from autoround_modifier.checkpoints.saved_weights import SavedWeights
from autoround_modifier.engines.layout import TensorLayout
from autoround_modifier.engines.scheme import Scheme
from autoround_modifier.errors import listed
from autoround_modifier.host.packed import unpack_integers
from autoround_modifier.host.schemes import QuantizationScheme
from autoround_modifier.inference.packed_weight import CHANNEL, PackedSpec, PackedWeight

__all__ = ["NotPackedError", "packed_layers", "read_weights"]

PACKED, SCALE, ZERO_POINT, SHAPE = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
)
# Bytes read from a file before it is opened again: what was read of a mapped file counts as memory
# of the process until the file is closed.
PORTION = 2**27


class NotPackedError(ValueError):
    """The weights of a checkpoint, or of a model, cannot stay packed."""


def packed_layers(folder: Path) -> dict[str, PackedSpec]:
    """
    No weight is read.

    :param folder: of a checkpoint
    :return: name of each quantized layer, as in the files -> its weight
    :raises NotPackedError: if it is not quantized, or in another way than integer weights that are
        packed, with activations as they are
    :raises CheckpointError: if a file cannot be read
    """
    quantization = quantization_of(read_json(folder / CONFIG))
    if quantization is None:
        raise NotPackedError("it is not quantized")
    method = quantization.get("quant_method")
    if method != COMPRESSED_TENSORS:
        raise NotPackedError(f"it is in the format {method}, not in {COMPRESSED_TENSORS}")
    layout = read_layout(folder)
    weights, shapes = SavedWeights(folder), _shapes(folder)
    specs: dict[str, PackedSpec] = {}
    reasons: dict[str, list[str]] = {reason: [] for reason in beside_weights(quantization)}
    for name in weights:
        scheme = weights.scheme(name, layout.tensors, shapes.get(name))
        reason = _not_packed(name, scheme, layout.tensors)
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
        else:
            specs[name] = _spec(name, scheme, shapes[name])
    if reasons:
        raise NotPackedError(
            "; ".join(
                reason + (f": {listed(names, 2)}" if names else "")
                for reason, names in reasons.items()
            )
        )
    return specs


def read_weights(folder: Path, specs: Iterable[PackedSpec]) -> Iterator[PackedWeight]:
    """
    Yield weights one by one, in the order of the files. Their tensors are copies, so that the files
    may change afterwards.

    :param folder: of a checkpoint
    :param specs: of layers in it
    :raises CheckpointError: if a file cannot be read
    """
    files = tensor_files(folder)
    waiting = deque(sorted(specs, key=lambda spec: files[f"{spec.name}.{PACKED}"].name))
    while waiting:
        path, size = files[f"{waiting[0].name}.{PACKED}"], 0
        with opened(path) as file:
            while waiting and size < PORTION and files[f"{waiting[0].name}.{PACKED}"] == path:
                spec = waiting.popleft()
                tensors = {}
                for part in (PACKED, SCALE, ZERO_POINT):
                    name = f"{spec.name}.{part}"
                    if files.get(name) == path:
                        tensors[part] = file.get_tensor(name).clone()
                    elif name in files:
                        with opened(files[name]) as other:
                            tensors[part] = other.get_tensor(name).clone()
                    if part in tensors:
                        size += tensors[part].nbytes
                yield _weight(spec, tensors)


def _weight(spec: PackedSpec, tensors: Mapping[str, Tensor]) -> PackedWeight:
    scale = tensors[SCALE]
    zero_point = None
    if not spec.symmetric:
        stored = tensors[ZERO_POINT]
        if stored.dtype == torch.int32:  # packed along the rows
            stored = unpack_integers(stored, spec.num_bits, tuple(scale.shape), dim=0)
        zero_point = stored.to(torch.int16).contiguous() + 2 ** (spec.num_bits - 1)
    return PackedWeight(spec, tensors[PACKED], scale, zero_point)


def _not_packed(
    name: str, scheme: QuantizationScheme, tensors: Mapping[str, TensorLayout]
) -> str | None:
    """:return: why a weight cannot stay packed; None if it can"""
    found = Scheme.of_group(scheme.model_dump(mode="json"))
    assert found is not None
    if found.numbers != "INT":
        return f"{found.label} is no integer format"
    if found.input_bits is not None or scheme.output_activations is not None:
        return f"{found.label} quantizes activations"
    if f"{name}.weight_g_idx" in tensors:
        return "columns are in the order of their activations (`actorder`)"
    if f"{name}.{PACKED}" not in tensors:
        return f"{found.label} is stored one integer to a byte"
    if found.strategy not in ("group", "channel"):
        return f"{found.label} has scales by {found.strategy}"
    return None


def _spec(name: str, scheme: QuantizationScheme, shape: Tensor) -> PackedSpec:
    weights = scheme.weights
    assert weights is not None
    rows, columns = shape.tolist()
    group_size = int(weights.group_size or CHANNEL)
    return PackedSpec(name, rows, columns, weights.num_bits, bool(weights.symmetric), group_size)


def _shapes(folder: Path) -> dict[str, Tensor]:
    """:return: layer -> shape of its weight before packing, (2,)"""
    by_file: dict[Path, list[str]] = {}
    for name, path in tensor_files(folder).items():
        if name.endswith(f".{SHAPE}"):
            by_file.setdefault(path, []).append(name)
    shapes = {}
    for path, names in by_file.items():
        with opened(path) as file:
            for name in names:
                shapes[name.removesuffix(f".{SHAPE}")] = file.get_tensor(name).clone()
    return shapes
