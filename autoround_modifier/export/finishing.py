"""What is put right in a checkpoint once LLM-Compressor has saved it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from autoround_modifier.export.check import check_saved
from autoround_modifier.host.prediction import quantization_section

__all__ = ["FINISHING_STEPS", "finish_checkpoint", "write_names"]

CONFIG = "config.json"
QUANTIZATION = "quantization_config"

FinishingStep = Callable[[PreTrainedModel, Path], None]


def write_names(model: PreTrainedModel, folder: Path) -> None:
    """Name layers in ``quantization_config`` so that every engine finds the same ones."""
    section = quantization_section(model)
    path = folder / CONFIG
    if section is None or not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    written = config.get(QUANTIZATION) or {}
    ignore = dict.fromkeys([*(written.get("ignore") or []), *section["ignore"]])
    config[QUANTIZATION] = {**written, **section, "ignore": list(ignore)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# In this order. Each takes the model, as it is after saving, and the folder with its files.
FINISHING_STEPS: tuple[FinishingStep, ...] = (write_names,)


def finish_checkpoint(model: PreTrainedModel, folder: Path, engine: str = "any") -> None:
    """
    Put files right, and log what is still wrong with them.

    :param model: that was saved; compressed
    :param folder: with all that LLM-Compressor wrote; files are changed and added
    :param engine: which must load it
    """
    for step in FINISHING_STEPS:
        step(model, folder)
    check_saved(model, folder, engine)
