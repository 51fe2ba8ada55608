"""
Exports to a GGUF file. llama.cpp's own converter makes one of the dequantized model, with its
metadata, vocabulary and names of tensors; here the tensors of quantized layers are replaced by
blocks with the integers. Converters of some families put rows in another order: it is found by
comparing rows of the dequantized weights, and weights that differ in more are refused.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from loguru import logger
from numpy.typing import NDArray
from torch import Tensor

from autoround_modifier.checkpoints.saved_config import text_part
from autoround_modifier.checkpoints.saved_files import CONFIG, write_json
from autoround_modifier.checkpoints.saved_weights import dtype_named
from autoround_modifier.errors import ExportError, MissingExtraError
from autoround_modifier.exports.gguf_blocks import BLOCK_TYPES, pack_blocks
from autoround_modifier.exports.gguf_vocabulary import (
    VOCABULARY_KEYS,
    check_vocabulary,
    vocabulary_fields,
)
from autoround_modifier.exports.integer_layers import IntegerCheckpoint, IntegerLayer
from autoround_modifier.exports.written_files import copy_others, write_weights

__all__ = ["LLAMA_CPP", "converter_script", "export_gguf"]

LLAMA_CPP = "LLAMA_CPP_ROOT"
SCRIPT = "convert_hf_to_gguf.py"
TEMPORARY_PREFIX = ".unfinished-"
# What the converter calls the dtypes of matrices that it leaves as they are
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
# Keys that the writer sets itself
OWN_KEYS = ("GGUF.", "general.architecture", "general.file_type")
MESSAGE_END = 1500


def converter_script(llama_cpp: str | os.PathLike[str] | None) -> Path:
    """
    :param llama_cpp: folder with llama.cpp's source; None for that of the environment variable
        LLAMA_CPP_ROOT
    :return: the converter in it
    :raises ExportError: if there is none
    :raises MissingExtraError: if the package `gguf` is not installed
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("exporting to GGUF", "gguf", "gguf") from error
    folder = llama_cpp or os.environ.get(LLAMA_CPP)
    if not folder:
        raise ExportError(
            "llama.cpp's converter writes the metadata and vocabulary of a GGUF file: get its "
            f"source (`git clone https://github.com/ggml-org/llama.cpp`) and set {LLAMA_CPP} to "
            "its folder"
        )
    script = Path(folder) / SCRIPT
    if not script.is_file():
        raise ExportError(
            f"{folder} has no {SCRIPT}; {LLAMA_CPP} is a folder of llama.cpp's source"
        )
    return script


def export_gguf(
    checkpoint: IntegerCheckpoint,
    kind: str,
    output: Path,
    script: Path,
    vocabulary: Path | None = None,
) -> int:
    """
    Needs room on the disk of ``output`` for the dequantized model, twice.

    :param checkpoint: whose layers the type holds
    :param kind: name of a type in `BLOCK_TYPES`
    :param output: file to write; it appears once it is complete
    :param script: see `converter_script`
    :param vocabulary: GGUF file of the same model, whose vocabulary is used; None for what the
        converter makes of the checkpoint's
    :return: bytes of the file
    :raises ExportError: if llama.cpp's converter does not know the model, or changes more of a
        weight than the order of its rows, or gets the vocabulary wrong
    :raises OSError: if the file cannot be written
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    part = text_part(checkpoint.config)
    dtype = dtype_named(
        next(
            (
                x.get(k)
                for x in (checkpoint.config, part)
                for k in ("dtype", "torch_dtype")
                if x.get(k)
            ),
            None,
        )
    )
    unfinished = output.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=output.parent) as temporary:
        template = _convert(checkpoint, Path(temporary), dtype, script)
        try:
            _graft(checkpoint, kind, template, unfinished, dtype, vocabulary)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(output)
        finally:
            unfinished.unlink(missing_ok=True)
    return output.stat().st_size


def _dequantize(layer: IntegerLayer, dtype: torch.dtype) -> Tensor:
    """:return: (out_features, in_features)"""
    scale, zero_point = (
        x.float().repeat_interleave(layer.spec.features_per_scale, 1)
        for x in (layer.scale, layer.zero_point)
    )
    return (scale * (layer.codes.float() - zero_point)).to(dtype)


def _convert(checkpoint: IntegerCheckpoint, folder: Path, dtype: torch.dtype, script: Path) -> Path:
    """:return: a GGUF file of the dequantized model"""
    dense, template = folder / "dense", folder / "dense.gguf"
    dense.mkdir()
    write_weights(checkpoint, lambda layer: {"weight": _dequantize(layer, dtype)}, dense)
    copy_others(checkpoint.folder, dense)
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    write_json(dense / CONFIG, config)
    logger.info(f"{script.name} converts the dequantized model")
    command = [sys.executable, str(script), str(dense), "--outfile", str(template)]
    done = subprocess.run(
        [*command, "--outtype", DTYPES[dtype]], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not template.is_file():
        raise ExportError(
            f"llama.cpp's converter does not convert this model:\n{done.stderr[-MESSAGE_END:]}"
        )
    return template


def _graft(
    checkpoint: IntegerCheckpoint,
    kind: str,
    template: Path,
    output: Path,
    dtype: torch.dtype,
    vocabulary: Path | None,
) -> None:
    """Write what the template holds, with blocks in place of the weights of quantized layers."""
    import gguf

    block_type = BLOCK_TYPES[kind]
    # gguf 0.19 ends at type 41
    sizes = cast(dict[int, tuple[int, int]], gguf.GGML_QUANT_SIZES)
    sizes.setdefault(block_type.number, (block_type.block, block_type.size))
    reader = gguf.GGUFReader(template)
    architecture = reader.fields["general.architecture"].contents()
    layers = _layer_names(checkpoint, architecture)
    missing = [name for name in layers if name not in {x.name for x in reader.tensors}]
    if missing:
        raise ExportError(
            f"llama.cpp's converter writes no tensor {missing[0]} for {layers[missing[0]]}"
        )
    writer = gguf.GGUFWriter(output, architecture)
    words = vocabulary_fields(reader, vocabulary)
    check_vocabulary(words, checkpoint.folder)
    others = {k: v for k, v in reader.fields.items() if not k.startswith(VOCABULARY_KEYS)}
    for key, field in (others | words).items():
        if not key.startswith(OWN_KEYS):
            value, types = field.contents(), field.types
            if types[0] != gguf.GGUFValueType.ARRAY or value:
                writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    writer.add_file_type(block_type.file_type)
    for tensor in reader.tensors:
        name = layers.get(tensor.name)
        if name is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        layer = checkpoint.layer(name)
        order = _row_order(_rows(_dequantize(layer, dtype)), _bytes_of_rows(tensor))
        if order is None:
            raise ExportError(
                f"{name}: llama.cpp's converter changes more than the order of its rows, so that "
                "its integers have no place in GGUF"
            )
        blocks = pack_blocks(layer, block_type)[order]
        writer.add_tensor(tensor.name, blocks, raw_dtype=block_type.number)  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _layer_names(checkpoint: IntegerCheckpoint, architecture: str) -> dict[str, str]:
    """
    :return: name of a tensor in GGUF -> the layer
    :raises ExportError: if the installed `gguf` does not know one
    """
    import gguf

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ExportError(f"the installed package `gguf` does not know the model {architecture}")
    count = text_part(checkpoint.config).get("num_hidden_layers") or 0
    names = gguf.get_tensor_name_map(known[architecture], count)
    result = {}
    for name in checkpoint.specs:
        found = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if found is None:
            raise ExportError(f"`gguf` has no name for {name} in a model of kind {architecture}")
        result[found] = name
    return result


def _rows(weight: Tensor) -> list[bytes]:
    """:return: the bytes of each row"""
    return [row.tobytes() for row in weight.contiguous().view(torch.uint8).numpy()]


def _bytes_of_rows(tensor: Any) -> list[bytes]:
    return [row.tobytes() for row in tensor.data]


def _row_order(ours: list[bytes], theirs: list[bytes]) -> NDArray[np.int64] | None:
    """:return: for each of their rows, the number of ours; None if they are not the same rows"""
    places: dict[bytes, list[int]] = {}
    for number, row in enumerate(ours):
        places.setdefault(row, []).append(number)
    for numbers in places.values():
        numbers.reverse()
    order = [places[row].pop() for row in theirs if places.get(row)]
    return np.array(order) if len(order) == len(theirs) == len(ours) else None
