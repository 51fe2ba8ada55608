"""Exports a saved checkpoint to another format, with the same integers, scales and zero points."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors.torch import save_file
from torch import Tensor

from autoround_modifier.errors import OutputExistsError
from autoround_modifier.export.auto_round_format import (
    auto_round_config,
    auto_round_notes,
    auto_round_tensors,
    packing_format,
)
from autoround_modifier.export.awq import awq_config, awq_tensors
from autoround_modifier.export.export_formats import check_format, check_scales, find_format
from autoround_modifier.export.gptq import gptq_config, gptq_notes, gptq_tensors, gptq_v1
from autoround_modifier.export.integer_layers import IntegerCheckpoint, IntegerLayer, IntegerSpec
from autoround_modifier.export.mlx import mlx_config, mlx_notes, mlx_tensors
from autoround_modifier.export.saved_files import CONFIG, INDEX, write_json
from autoround_modifier.host.saving import UNFINISHED_PREFIX, written_at_once

__all__ = ["Exported", "export_checkpoint"]

GPTQ_CONFIG = "quantize_config.json"
# Files beside the weights that are about the checkpoint in its own format
NOT_COPIED = ("README.md", "quantization_report.json", "evaluation.json", GPTQ_CONFIG)
NOT_COPIED_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".html", ".index.json")
CHAT_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Exported:
    """
    :ivar folder: that holds the exported checkpoint
    :ivar format: its format
    :ivar layers: number of quantized layers
    :ivar bytes: of all its safetensors files
    :ivar notes: which loaders do not take it, and what else a user should know
    """

    folder: Path
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
    """

    config_keys: tuple[str, ...]
    section: dict[str, Any]
    tensors: Callable[[IntegerLayer], dict[str, Tensor]]
    notes: tuple[str, ...] = ()


def export_checkpoint(
    source: str | os.PathLike[str],
    format: str,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Exported:
    """
    Write a checkpoint with integer weights in the format of another family of engines. Integers,
    scales and zero points are the same; what the format would change is refused before anything is
    written. One file of the checkpoint is in memory at a time.

    :param source: folder of a compressed-tensors checkpoint whose weights alone are quantized, to
        integers: one of `quantize`, or of anybody else
    :param format: ``gptq``, ``awq``, ``auto_round`` or ``mlx``
    :param output: folder to write to. Weights and ``config.json`` appear in it once all are
        written, ``config.json`` last
    :param overwrite: the folder may hold files; weights of an earlier checkpoint go
    :return: what was written
    :raises CheckpointError: if ``source`` is no such checkpoint, or cannot be read
    :raises ExportError: if there is no such format, or it cannot hold the checkpoint
    :raises OutputExistsError: if ``output`` holds files and ``overwrite`` is false, or is, contains
        or lies in ``source``
    :raises OSError: if it cannot be written to
    """
    source, output, chosen = Path(source), Path(output), find_format(format)
    _check_output(output, source, overwrite)
    checkpoint = IntegerCheckpoint(source)
    specs, skipped = list(checkpoint.specs.values()), checkpoint.unquantized_layers
    check_format(chosen, specs, skipped)
    check_scales(chosen, ((spec, checkpoint.scale(spec.name)) for spec in specs))
    plan = _PLANS[chosen.name](specs, skipped)
    with written_at_once(output) as unfinished:
        size = _write_weights(checkpoint, plan, unfinished.path, chosen.name)
        _copy_others(source, unfinished.path)
        if chosen.name == "gptq":
            write_json(unfinished.path / GPTQ_CONFIG, plan.section)
        config = {
            key: value for key, value in checkpoint.config.items() if key != "quantization_config"
        }
        config |= dict.fromkeys(plan.config_keys, plan.section)
        write_json(unfinished.path / CONFIG, config)
        unfinished.complete = True
    if chosen.name != "gptq":
        (output / GPTQ_CONFIG).unlink(missing_ok=True)  # of an earlier export
    return Exported(output, chosen.name, len(specs), size, plan.notes)


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
    return _Plan(keys, mlx_config(specs), mlx_tensors, tuple(mlx_notes(specs)))


_PLANS: dict[str, Callable[[Sequence[IntegerSpec], Sequence[str]], _Plan]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto_round": _auto_round,
    "mlx": _mlx,
}


def _check_output(output: Path, source: Path, overwrite: bool) -> None:
    """:raises OutputExistsError: see `export_checkpoint`"""
    here, there = output.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputExistsError(
            f"{output} is the folder of the checkpoint {source}, contains it or lies in it; choose "
            "another folder"
        )
    if here.is_file():
        raise OutputExistsError(f"{output} is a file; choose a folder")
    if here.is_dir() and not overwrite:
        held = [x.name for x in here.iterdir() if not x.name.startswith(UNFINISHED_PREFIX)]
        if held:
            raise OutputExistsError(
                f"{output} exists and is not empty; choose another folder, or write over its "
                "checkpoint with `overwrite` (`--overwrite`)"
            )


def _write_weights(checkpoint: IntegerCheckpoint, plan: _Plan, folder: Path, format: str) -> int:
    """:return: bytes of all tensors"""
    weight_map: dict[str, str] = {}
    total, files = 0, list(checkpoint.files())
    for number, (file, layers, others) in enumerate(files, start=1):
        logger.info(f"{format}: file {number} of {len(files)}, {file}")
        tensors = {name: checkpoint.tensor(name) for name in others}
        for name in layers:
            made = plan.tensors(checkpoint.layer(name))
            tensors |= {f"{name}.{part}": tensor for part, tensor in made.items()}
        if not tensors:
            continue
        save_file(tensors, folder / file, metadata={"format": "mlx" if format == "mlx" else "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(weight_map.values())) > 1 or (checkpoint.folder / INDEX).is_file():
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _copy_others(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat templates, generation config and code, but no weights or reports."""
    for path in sorted(source.iterdir()):
        if path.name == CHAT_TEMPLATES and path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif (
            path.is_file()
            and not path.name.startswith(".")
            and path.name not in (CONFIG, *NOT_COPIED)
            and not path.name.endswith(NOT_COPIED_ENDINGS)
        ):
            shutil.copyfile(path, folder / path.name)
