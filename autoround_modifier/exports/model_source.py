"""A quantized model in memory, saved for a moment, so that it is exported as a folder is."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from autoround_modifier.errors import ExportError
from autoround_modifier.exports.predicted import check_predicted, predict_specs
from autoround_modifier.host.applied_schemes import quantized_names
from autoround_modifier.host.layers import weight_folders
from autoround_modifier.host.quantized_weights import quantized_layers
from autoround_modifier.host.saving import UNFINISHED_PREFIX
from autoround_modifier.host.schemes import QuantizationStatus
from autoround_modifier.parallel import is_distributed

__all__ = ["SavedModel", "Tokenizer", "check_model", "model_folders", "saved_beside"]

Tokenizer: TypeAlias = str | os.PathLike[str] | PreTrainedTokenizerBase | ProcessorMixin


@dataclass(frozen=True)
class SavedModel:
    """
    :ivar folder: that holds the model, with its tokenizer, as a compressed-tensors checkpoint
    :ivar notes: what a user should know of it
    """

    folder: Path
    notes: tuple[str, ...]


def check_model(model: PreTrainedModel, format: str) -> None:
    """
    Nothing is written, and the model is not changed.

    :param format: to which it is to be exported
    :raises RuntimeError: if several processes were started together
    :raises ExportError: if the model is not quantized, or the format cannot hold it
    """
    if is_distributed():
        raise RuntimeError(
            "a model in memory is exported by one process; save it, and export the folder"
        )
    layers = [layer for _, layer, _ in quantized_layers(model)]
    if not layers and not quantized_names(model):
        raise ExportError("the model has no quantized layer")
    if not layers or any(_is_compressed(layer) for layer in layers):
        return  # tuned in types of GGUF, or saved before: the checkpoint tells
    check_predicted(format, predict_specs(model, (), "the model"))


def _is_compressed(layer: Any) -> bool:
    return getattr(layer, "quantization_status", None) == QuantizationStatus.COMPRESSED


def model_folders(model: PreTrainedModel) -> set[Path]:
    """:return: folders from which the model was, or still is, read"""
    name = model.config._name_or_path
    return weight_folders(model) | ({Path(name)} if name and Path(name).is_dir() else set())


@contextlib.contextmanager
def saved_beside(
    model: PreTrainedModel, output: Path, tokenizer: Tokenizer | None
) -> Iterator[SavedModel]:
    """
    Yields a checkpoint of the model on the disk of ``output``, which goes afterwards. The model is
    left as `save_pretrained` leaves it: compressed, until it runs again.

    :param model: quantized
    :param output: to which it is exported
    :param tokenizer: or processor, or where to load it from; None for that of the folder, or of the
        download, that the model was loaded from
    :raises ExportError: if there is no such tokenizer
    :raises OSError: if it cannot be saved
    """
    loaded = _loaded(tokenizer)
    notes = []
    if loaded is None:
        loaded = _own_tokenizer(model)
        if loaded is None:
            notes.append("there is no tokenizer in it: none was given, and the model names none")
    nearest = next(path for path in output.resolve().parents if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=UNFINISHED_PREFIX, dir=nearest) as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        if loaded is not None:
            loaded.save_pretrained(folder)
        yield SavedModel(folder, tuple(notes))


def _loaded(tokenizer: Tokenizer | None) -> Any:
    """:raises ExportError: if there is no such tokenizer"""
    if tokenizer is None or hasattr(tokenizer, "save_pretrained"):
        return tokenizer
    try:
        return AutoProcessor.from_pretrained(os.fspath(cast(Any, tokenizer)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(f"the tokenizer of {tokenizer} cannot be loaded: {reason}") from error


def _own_tokenizer(model: PreTrainedModel) -> Any:
    """
    A config is data from somebody else, so what it names is not fetched.

    :return: None if there is none on this machine
    """
    name, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    if not name:
        return None
    with contextlib.suppress(OSError, ValueError):
        return AutoProcessor.from_pretrained(
            name, revision=revision or "main", local_files_only=True, trust_remote_code=False
        )
    return None
