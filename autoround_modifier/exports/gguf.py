"""
Exports to a GGUF file. llama.cpp's own converter makes one of the dequantized model, with its
metadata, vocabulary and names of tensors; here the tensors of quantized layers are replaced by
blocks. Converters of some families put rows in another order: it is found by comparing rows of the
dequantized weights, and weights that differ in more are refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoround_modifier.exports.gguf_rounding import Rounding
from autoround_modifier.exports.gguf_template import convert, dtype_of_config
from autoround_modifier.exports.gguf_writing import PackedLayer, graft
from autoround_modifier.runs.files import TEMPORARY_PREFIX, atomic_file

__all__ = ["GGUFSource", "write_gguf"]


@dataclass(frozen=True)
class GGUFSource:
    """
    A checkpoint whose quantized layers are there as blocks.

    :ivar folder: of the checkpoint, with its tokenizer
    :ivar config: its ``config.json``
    :ivar layers: name of a layer -> its blocks
    :ivar dense: given an empty folder, returns one with the same model as an ordinary checkpoint,
        whose weights are not quantized: the given one, or one that is there already
    :ivar file_type: ``general.file_type``
    """

    folder: Path
    config: Mapping[str, Any]
    layers: Mapping[str, PackedLayer]
    dense: Callable[[Path], Path]
    file_type: int


def write_gguf(
    source: GGUFSource,
    output: Path,
    script: Path,
    vocabulary: Path | None = None,
    rounding: Rounding | None = None,
) -> int:
    """
    Needs room on the disk of ``output`` for the dequantized model, twice.

    :param source: what is written
    :param output: file to write; it appears once it is complete
    :param script: see `gguf_template.converter_script`
    :param vocabulary: GGUF file of the same model, whose vocabulary is used; None for what the
        converter makes of the checkpoint's
    :param rounding: of embeddings and head; None to keep them
    :return: bytes of the file
    :raises ExportError: if llama.cpp's converter does not know the model, or changes more of a
        weight than the order of its rows, or gets the vocabulary wrong
    :raises OSError: if the file cannot be written
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=output.parent) as temporary:
        template, empty = Path(temporary) / "dense.gguf", Path(temporary) / "dense"
        empty.mkdir()
        convert(
            source.dense(empty),
            template,
            dtype_of_config(source.config),
            script,
            vocabulary=vocabulary is None,
        )
        with atomic_file(output) as unfinished:
            graft(
                template,
                source.layers,
                unfinished,
                folder=source.folder,
                config=source.config,
                file_type=source.file_type,
                vocabulary=vocabulary,
                rounding=rounding,
            )
    return output.stat().st_size
