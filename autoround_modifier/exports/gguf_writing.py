"""
Writes a GGUF file: what the file of llama.cpp's converter holds, with blocks in place of the
weights of quantized layers. Each layer brings a type of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autoround_modifier.checkpoints.saved_config import text_part
from autoround_modifier.errors import ExportError, listed
from autoround_modifier.exports.gguf_names import tensor_names
from autoround_modifier.exports.gguf_rounding import Rounding
from autoround_modifier.exports.gguf_rows import row_order
from autoround_modifier.exports.gguf_types import BlockType, Bytes, register_types
from autoround_modifier.exports.gguf_vocabulary import (
    VOCABULARY_KEYS,
    check_vocabulary,
    vocabulary_fields,
)

__all__ = ["PackedLayer", "graft"]

# Keys that the writer sets itself
OWN_KEYS = ("GGUF.", "general.architecture", "general.file_type")
FLOAT32 = 0


@dataclass(frozen=True)
class PackedLayer:
    """
    A quantized layer, read when it is asked for. Rows are in the order of the checkpoint.

    :ivar kind: type of its blocks
    :ivar blocks: makes them, (out_features, in_features / block * size)
    :ivar weight: makes what they hold, (out_features, in_features), as it is in the dense
        checkpoint: rows are found in the converter's file by it
    :ivar scale: factor of the whole weight, which llama.cpp reads from a tensor of its own; None
        for types that have none
    """

    kind: BlockType
    blocks: Callable[[], Bytes]
    weight: Callable[[], Tensor]
    scale: float | None = None


class _Written(NamedTuple):
    """
    A tensor of the file.

    :ivar number: of its type
    :ivar shape: as the writer takes it: of blocks in bytes
    :ivar dtype: of its data
    :ivar data: makes it
    """

    name: str
    number: int
    shape: tuple[int, ...]
    dtype: Any
    data: Callable[[], NDArray[Any]]


def graft(
    template: Path,
    layers: Mapping[str, PackedLayer],
    output: Path,
    *,
    folder: Path,
    config: Mapping[str, Any],
    file_type: int,
    vocabulary: Path | None,
    rounding: Rounding | None = None,
) -> None:
    """
    One tensor is in memory at a time.

    :param template: the converter's file of the dense checkpoint
    :param layers: name of a layer in the checkpoint -> its blocks
    :param output: file to write
    :param folder: of the checkpoint
    :param config: its ``config.json``
    :param file_type: ``general.file_type``
    :param vocabulary: GGUF file of the same model, whose vocabulary is used; None for that of
        the template
    :param rounding: of embeddings and head where they are not among the layers; None to keep them
    :raises ExportError: if the template has no tensor for a layer, or changes more of a weight
        than the order of its rows, or gets the vocabulary wrong
    """
    import gguf

    register_types()
    reader = gguf.GGUFReader(template)
    architecture = reader.fields["general.architecture"].contents()
    names = tensor_names(
        layers,
        architecture,
        text_part(config).get("num_hidden_layers") or 0,
        {tensor.name: tensor.data.shape for tensor in reader.tensors},
    )
    writer = gguf.GGUFWriter(output, architecture)
    words = vocabulary_fields(reader, vocabulary)
    check_vocabulary(words, folder)
    _copy_fields(reader, words, writer)
    writer.add_file_type(file_type)
    tensors = [
        made
        for tensor in reader.tensors
        for made in _tensors(tensor, {x: layers[x] for x in names.get(tensor.name, ())}, rounding)
    ]
    for made in tensors:
        dtype = np.dtype(made.dtype)
        size = int(np.prod(made.shape)) * dtype.itemsize
        number = cast(Any, made.number)  # gguf may not know it
        writer.add_tensor_info(made.name, made.shape, dtype, size, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for made in tensors:
        writer.write_tensor_data(made.data())
    writer.close()


def _copy_fields(reader: Any, vocabulary: Mapping[str, Any], writer: Any) -> None:
    """Add the reader's fields to the writer, with those of the vocabulary in place of its own."""
    import gguf

    others = {k: v for k, v in reader.fields.items() if not k.startswith(VOCABULARY_KEYS)}
    for key, field in (others | dict(vocabulary)).items():
        if not key.startswith(OWN_KEYS):
            value, types = field.contents(), field.types
            if types[0] != gguf.GGUFValueType.ARRAY or value:
                writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)


def _tensors(
    tensor: Any, layers: Mapping[str, PackedLayer], rounding: Rounding | None
) -> Iterator[_Written]:
    """
    Yield what is written for a tensor of the template.

    :param layers: by name, that are stacked in it; none if it is not quantized
    :raises ExportError: if the layers have several types
    """
    if layers:
        yield from _stack(tensor, layers)
    elif rounding is not None and (kind := rounding.kind(tensor)) is not None:
        shape = _shape(tensor, kind)
        yield _Written(tensor.name, kind.number, shape, np.uint8, lambda: rounding.round(tensor))
    else:
        data = tensor.data
        yield _Written(tensor.name, tensor.tensor_type, data.shape, data.dtype, lambda: data)


def _stack(tensor: Any, layers: Mapping[str, PackedLayer]) -> Iterator[_Written]:
    kinds = {layer.kind for layer in layers.values()}
    if len(kinds) > 1:
        used = ", ".join(sorted(kind.name for kind in kinds))
        raise ExportError(
            f"{tensor.name} has one type, and its experts {used}: {listed(list(layers))}"
        )
    kind = kinds.pop()

    def blocks() -> Bytes:
        parts = tensor.data if len(layers) > 1 else [tensor.data]
        packed = [_blocks(*item, part) for item, part in zip(layers.items(), parts, strict=True)]
        return np.stack(packed) if len(layers) > 1 else packed[0]

    yield _Written(tensor.name, kind.number, _shape(tensor, kind), np.uint8, blocks)
    scales = [layer.scale for layer in layers.values() if layer.scale is not None]
    if scales:
        name = tensor.name.removesuffix("weight") + "scale"
        numbers = np.array(scales, dtype=np.float32)
        yield _Written(name, FLOAT32, numbers.shape, np.float32, lambda: numbers)


def _shape(tensor: Any, kind: BlockType) -> tuple[int, ...]:
    """:return: of the tensor's blocks, in bytes"""
    columns, *rows = (int(size) for size in tensor.shape)
    return (*reversed(rows), columns // kind.block * kind.size)


def _blocks(name: str, layer: PackedLayer, converted: NDArray[Any]) -> Bytes:
    """
    :param converted: the weight in the converter's file
    :return: the layer's blocks, rows in the order of that file
    :raises ExportError: if its rows are others
    """
    order = row_order(layer.weight(), converted)
    if order is None:
        raise ExportError(
            f"{name}: llama.cpp's converter changes more than the order of its rows, so that its "
            "integers have no place in GGUF"
        )
    return layer.blocks()[order]
