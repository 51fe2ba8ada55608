"""Exports a quantized model to another format, with the same integers, scales and zero points."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from autoround_modifier.checkpoints.gguf_blocks import find_blocks_file
from autoround_modifier.checkpoints.saved_files import CONFIG, write_json
from autoround_modifier.errors import ExportError, OutputExistsError
from autoround_modifier.exports.auto_round_format import (
    auto_round_config,
    auto_round_notes,
    auto_round_tensors,
    packing_format,
)
from autoround_modifier.exports.awq import awq_config, awq_tensors
from autoround_modifier.exports.export_formats import (
    GGUF,
    check_format,
    check_scales,
    find_format,
)
from autoround_modifier.exports.float_layers import WeightCheckpoint
from autoround_modifier.exports.gguf import write_gguf
from autoround_modifier.exports.gguf_checkpoint import checkpoint_source
from autoround_modifier.exports.gguf_choice import choose_types
from autoround_modifier.exports.gguf_rounding import Rounding, rounding_notes
from autoround_modifier.exports.gguf_template import converter_script
from autoround_modifier.exports.gguf_tuned import TunedCheckpoint
from autoround_modifier.exports.gptq import gptq_config, gptq_notes, gptq_tensors, gptq_v1
from autoround_modifier.exports.integer_layers import IntegerCheckpoint, IntegerLayer, IntegerSpec
from autoround_modifier.exports.mlx import mlx_config, mlx_fields, mlx_notes, mlx_tensors
from autoround_modifier.exports.model_source import (
    Tokenizer,
    check_model,
    model_folders,
    saved_beside,
)
from autoround_modifier.exports.written_files import copy_others, write_weights
from autoround_modifier.gguf_schemes import gguf_scheme
from autoround_modifier.host.saving import written_at_once
from autoround_modifier.runs.output_folder import holds_files

__all__ = ["Exported", "export"]

GPTQ_CONFIG = "quantize_config.json"
METADATA = {"mlx": "mlx"}


@dataclass(frozen=True)
class Exported:
    """
    :ivar output: folder that holds the exported checkpoint, or the file
    :ivar format: its format
    :ivar layers: number of quantized layers
    :ivar bytes: of its tensors; for GGUF of the file
    :ivar notes: which loaders do not take it, and what else a user should know
    """

    output: Path
    format: str
    layers: int
    bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """
    :ivar config_keys: of ``config.json``, under which the format's section stands
    :ivar section: that section
    :ivar tensors: makes the tensors of a layer, by the last parts of their names
    :ivar fields: makes ``config.json`` of that of the checkpoint, without the section
    """

    config_keys: tuple[str, ...]
    section: dict[str, Any]
    tensors: Callable[[IntegerLayer], dict[str, Tensor]]
    notes: tuple[str, ...] = ()
    fields: Callable[[dict[str, Any]], dict[str, Any]] = dict


def export(
    source: str | os.PathLike[str] | PreTrainedModel,
    format: str,
    output: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    llama_cpp: str | os.PathLike[str] | None = None,
    vocabulary: str | os.PathLike[str] | None = None,
    embeddings: str | None = None,
) -> Exported:
    """
    Write a checkpoint with integer weights in the format of another family of engines. Integers,
    scales and zero points are the same; what the format would change is refused before anything is
    written. One file of the checkpoint is in memory at a time.

    :param source: folder of a compressed-tensors checkpoint whose weights alone are quantized, to
        integers; for GGUF also to MXFP4 or NVFP4. One of `quantize`, or of anybody else. Or a model
        in memory, as `quantize` and `oneshot` return it: it is saved beside ``output`` for a
        moment, and left as `save_pretrained` leaves it
    :param format: ``gptq``, ``awq``, ``auto_round``, ``mlx``, or a type of GGUF: ``gguf:q2_0``,
        ``gguf:tq2_0``, ``gguf:q4_0``, ``gguf:q4_1``, ``gguf:q5_0``, ``gguf:q5_1``, ``gguf:q8_0``,
        ``gguf:mxfp4`` or ``gguf:nvfp4``. Layers that it does not hold get the smallest type that
        does, and so do all layers with ``gguf:auto``. A checkpoint that was tuned in a scheme of
        GGUF such as ``gguf:q4_k_m`` is written as that
    :param output: folder to write to. Weights and ``config.json`` appear in it once all are
        written, ``config.json`` last. For GGUF the file, which ends in ``.gguf``
    :param tokenizer: of a model in memory: tokenizer or processor, or name or folder of one; None
        for that of the folder, or of the download, from which the model was loaded. A folder has
        its own
    :param overwrite: the folder may hold files; weights of an earlier checkpoint go. For GGUF the
        file may be there
    :param llama_cpp: for GGUF, folder with llama.cpp's source, whose converter writes metadata and
        vocabulary; None for that of the environment variable LLAMA_CPP_ROOT
    :param vocabulary: for GGUF, another GGUF file of the same model, whose vocabulary is used; None
        for what the converter makes of the checkpoint's
    :param embeddings: for GGUF, ``f16``, ``bf16``, ``q8_0`` or ``q6_k``: type to which embeddings
        and head are rounded where they are not quantized; None to keep them
    :return: what was written
    :raises CheckpointError: if ``source`` is no such checkpoint, or cannot be read
    :raises ExportError: if there is no such format, or it cannot hold the checkpoint; for GGUF also
        if llama.cpp's converter is not there, or does not convert the model
    :raises MissingExtraError: for GGUF, if the package `gguf` is not installed
    :raises OutputExistsError: if ``output`` is there and ``overwrite`` is false, or if it is,
        contains or lies in ``source``
    :raises OSError: if it cannot be written to
    :raises RuntimeError: if several processes were started together, and a model is in memory
    """
    output, name = Path(output), gguf_scheme(format) or find_format(format).name
    is_file = name.startswith(GGUF)
    if not isinstance(source, nn.Module):
        if tokenizer is not None:
            raise ExportError(
                f"{source} is a folder, whose own tokenizer is used; `tokenizer` goes with a model "
                "in memory"
            )
        _check_output(output, {Path(source)}, overwrite, is_file)
        return _export_folder(Path(source), name, output, llama_cpp, vocabulary, embeddings)
    _check_output(output, model_folders(source), overwrite, is_file)
    if is_file:
        converter_script(llama_cpp)  # refuses before anything is saved
    check_model(source, name)
    with saved_beside(source, output, tokenizer) as saved:
        exported = _export_folder(saved.folder, name, output, llama_cpp, vocabulary, embeddings)
    return replace(exported, notes=(*saved.notes, *exported.notes))


def _export_folder(
    source: Path,
    name: str,
    output: Path,
    llama_cpp: str | os.PathLike[str] | None,
    vocabulary: str | os.PathLike[str] | None,
    embeddings: str | None,
) -> Exported:
    """
    :param source: folder of a compressed-tensors checkpoint, or of one with blocks of GGUF
    :param name: of the format; for the others see `export`
    """
    is_tuned = gguf_scheme(name) is not None or find_blocks_file(source) is not None
    if is_tuned or name.startswith(GGUF):
        words = None if vocabulary is None else Path(vocabulary)
        rounding = None if embeddings is None else Rounding(embeddings)
        return _export_gguf(source, name, output, llama_cpp, words, rounding, is_tuned)
    chosen = find_format(name)
    if embeddings is not None:
        raise ExportError(f"`embeddings` is for GGUF; {chosen.name} keeps them as they are")
    checkpoint = IntegerCheckpoint(source)
    specs, skipped = list(checkpoint.specs.values()), checkpoint.unquantized_layers
    check_format(chosen, specs, skipped)
    check_scales(chosen, ((spec, checkpoint.scale(spec.name)) for spec in specs))
    plan = _PLANS[chosen.name](specs, skipped)
    with written_at_once(output) as unfinished:
        size = write_weights(
            checkpoint,
            lambda name: plan.tensors(checkpoint.layer(name)),
            unfinished.path,
            METADATA.get(chosen.name, "pt"),
        )
        copy_others(source, unfinished.path)
        if chosen.name == "gptq":
            write_json(unfinished.path / GPTQ_CONFIG, plan.section)
        config = {
            key: value for key, value in checkpoint.config.items() if key != "quantization_config"
        }
        config = plan.fields(config) | dict.fromkeys(plan.config_keys, plan.section)
        write_json(unfinished.path / CONFIG, config)
        unfinished.complete = True
    if chosen.name != "gptq":
        (output / GPTQ_CONFIG).unlink(missing_ok=True)  # of an earlier export
    return Exported(output, chosen.name, len(specs), size, plan.notes)


def _export_gguf(
    source: Path,
    name: str,
    output: Path,
    llama_cpp: str | os.PathLike[str] | None,
    vocabulary: Path | None,
    rounding: Rounding | None,
    is_tuned: bool,
) -> Exported:
    """:param is_tuned: whether the source is, or has to be, one with blocks of GGUF"""
    notes: tuple[str, ...] = ()
    if is_tuned:  # as it was tuned, whatever type of GGUF is asked for
        tuned = TunedCheckpoint(source, name)
        made, tensors, name = tuned.source(), tuned.layout.tensors, tuned.scheme
    else:
        checkpoint = WeightCheckpoint(source)
        choice = choose_types(checkpoint, name.removeprefix(GGUF))
        made, tensors = checkpoint_source(checkpoint, choice.kinds), checkpoint.tensors
        notes = choice.notes
    size = write_gguf(made, output, converter_script(llama_cpp), vocabulary, rounding)
    rounded = rounding_notes(tensors, made.layers, rounding, size)
    return Exported(output, name, len(made.layers), size, (*notes, *rounded))


def _gptq(specs: Sequence[IntegerSpec], skipped: Sequence[str]) -> _Plan:
    v1 = gptq_v1(specs)
    return _Plan(
        ("quantization_config",),
        gptq_config(specs, skipped),
        lambda layer: gptq_tensors(layer, v1),
        tuple(gptq_notes(specs, skipped)),
    )


def _awq(specs: Sequence[IntegerSpec], skipped: Sequence[str]) -> _Plan:
    return _Plan(("quantization_config",), awq_config(specs, skipped), awq_tensors)


def _auto_round(specs: Sequence[IntegerSpec], skipped: Sequence[str]) -> _Plan:
    packing = packing_format(specs)
    return _Plan(
        ("quantization_config",),
        auto_round_config(specs, skipped),
        lambda layer: auto_round_tensors(layer, packing),
        tuple(auto_round_notes(specs)),
    )


def _mlx(specs: Sequence[IntegerSpec], skipped: Sequence[str]) -> _Plan:
    keys = ("quantization", "quantization_config")  # as mlx-lm writes it
    return _Plan(keys, mlx_config(specs), mlx_tensors, tuple(mlx_notes(specs)), mlx_fields)


_PLANS: dict[str, Callable[[Sequence[IntegerSpec], Sequence[str]], _Plan]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto_round": _auto_round,
    "mlx": _mlx,
}


def _check_output(output: Path, sources: Iterable[Path], overwrite: bool, is_file: bool) -> None:
    """
    :param sources: folders from which the model is read
    :param is_file: whether ``output`` is to be a file
    :raises ExportError: if it is to be a file and does not end in ``.gguf``
    :raises OutputExistsError: see `export`
    """
    if is_file and output.suffix != ".gguf":
        raise ExportError(f"{output}: GGUF is one file; name one that ends in .gguf")
    here = output.resolve()
    for source in sources:
        there = source.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise OutputExistsError(
                f"{output} is the folder of the checkpoint {source}, contains it or lies in it; "
                "choose another place"
            )
    if here.is_dir() if is_file else here.is_file():
        kinds = ("folder", "file") if is_file else ("file", "folder")
        raise OutputExistsError(f"{output} is a {kinds[0]}; choose a {kinds[1]}")
    if not overwrite and (holds_files(here) if here.is_dir() else here.exists()):
        raise OutputExistsError(
            f"{output} is there already; choose another, or write over it with `overwrite` "
            "(`--overwrite`)"
        )
