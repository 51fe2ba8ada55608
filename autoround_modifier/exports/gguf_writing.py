"""
Writes a GGUF file: what the file of llama.cpp's converter holds, with blocks in place of the
weights of quantized layers. Each brings a type of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from autoround_modifier.checkpoints.saved_config import text_part
from autoround_modifier.errors import ExportError
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


@dataclass(frozen=True)
class PackedLayer:
    """
    A quantized layer, read when it is asked for. Rows are in the order of the checkpoint.

    :ivar kind: type of its blocks
    :ivar blocks: makes them, (out_features, in_features / block * size)
    :ivar weight: makes what they hold, (out_features, in_features), as it is in the dense
        checkpoint: rows are found in the converter's file by it
    """

    kind: BlockType
    blocks: Callable[[], Bytes]
    weight: Callable[[], Tensor]


def graft(
    template: Path,
    layers: Mapping[str, PackedLayer],
    output: Path,
    *,
    folder: Path,
    config: Mapping[str, Any],
    file_type: int,
    vocabulary: Path | None,
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
    :raises ExportError: if the template has no tensor for a layer, or changes more of a weight
        than the order of its rows, or gets the vocabulary wrong
    """
    import gguf

    register_types()
    reader = gguf.GGUFReader(template)
    architecture = reader.fields["general.architecture"].contents()
    names = _tensor_names(layers, architecture, text_part(config).get("num_hidden_layers") or 0)
    there = {tensor.name for tensor in reader.tensors}
    missing = [found for found in names if found not in there]
    if missing:
        raise ExportError(
            f"llama.cpp's converter writes no tensor {missing[0]} for {names[missing[0]]}"
        )
    writer = gguf.GGUFWriter(output, architecture)
    words = vocabulary_fields(reader, vocabulary)
    check_vocabulary(words, folder)
    _copy_fields(reader, words, writer)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is None:
            data, kind = tensor.data, tensor.tensor_type
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, kind)
        else:
            found = layers[name].kind
            columns, *rows = (int(size) for size in tensor.shape)
            shape = (*reversed(rows), columns // found.block * found.size)
            writer.add_tensor_info(
                tensor.name,
                shape,
                np.dtype(np.uint8),
                int(np.prod(shape)),
                found.number,  # type: ignore[arg-type]
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        data = tensor.data if name is None else _blocks(name, layers[name], tensor.data)
        writer.write_tensor_data(data)
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


def _blocks(name: str, layer: PackedLayer, converted: Any) -> Bytes:
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


def _tensor_names(
    layers: Mapping[str, PackedLayer], architecture: str, count: int
) -> dict[str, str]:
    """
    :param count: of the model's blocks
    :return: name of a tensor in GGUF -> the layer
    :raises ExportError: if the installed `gguf` does not know one
    """
    import gguf

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ExportError(f"the installed package `gguf` does not know the model {architecture}")
    names = gguf.get_tensor_name_map(known[architecture], count)
    result = {}
    for name in layers:
        found = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if found is None:
            raise ExportError(f"`gguf` has no name for {name} in a model of kind {architecture}")
        result[found] = name
    return result
