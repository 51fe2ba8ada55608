"""Writes an exported checkpoint: its safetensors files, and what is beside them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from loguru import logger
from safetensors.torch import save_file
from torch import Tensor

from autoround_modifier.checkpoints.saved_files import CONFIG, INDEX, write_json
from autoround_modifier.exports.integer_layers import IntegerCheckpoint

__all__ = ["copy_others", "write_weights"]

# Files beside the weights that are about the checkpoint in its own format
NOT_COPIED = (
    CONFIG,
    "README.md",
    "quantization_report.json",
    "evaluation.json",
    "quantize_config.json",
)
NOT_COPIED_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".html", ".index.json")
CHAT_TEMPLATES = "additional_chat_templates"


def write_weights(
    checkpoint: IntegerCheckpoint,
    convert: Callable[[str], dict[str, Tensor]],
    folder: Path,
    framework: str = "pt",
) -> int:
    """
    Write a file for each file of the checkpoint, and an index where that has one.

    :param convert: name of a layer -> its tensors, by the last parts of their names
    :param folder: to write to
    :param framework: that the metadata of the files name
    :return: bytes of all tensors
    :raises CheckpointError: if the checkpoint cannot be read
    """
    weight_map: dict[str, str] = {}
    total, files = 0, list(checkpoint.files())
    for number, (file, layers, others) in enumerate(files, start=1):
        logger.info(f"file {number} of {len(files)}: {file}")
        tensors = {name: checkpoint.tensor(name) for name in others}
        for name in layers:
            made = convert(name)
            tensors |= {f"{name}.{part}": tensor for part, tensor in made.items()}
        if not tensors:
            continue
        save_file(tensors, folder / file, metadata={"format": framework})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(weight_map.values())) > 1 or (checkpoint.folder / INDEX).is_file():
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def copy_others(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat templates, generation config and code, but no weights or reports."""
    for path in sorted(source.iterdir()):
        if path.name == CHAT_TEMPLATES and path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif (
            path.is_file()
            and not path.name.startswith(".")
            and path.name not in NOT_COPIED
            and not path.name.endswith(NOT_COPIED_ENDINGS)
        ):
            shutil.copyfile(path, folder / path.name)
