"""`oneshot`: LLM-Compressor's own, with shipped recipes by name and early refusal of mistakes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sized
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel

from autoround_modifier.calibration import text_dataset
from autoround_modifier.errors import CalibrationError, OutputExistsError, RecipeError
from autoround_modifier.host.lifecycle import (
    host_oneshot,
    recipe_classes,
    without_error_propagation,
)
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.parallel import gathered, is_distributed, process_rank
from autoround_modifier.recipes import check_recipe, find_recipe

__all__ = ["oneshot"]


def oneshot(
    model: str | PreTrainedModel,
    recipe: Any = None,
    dataset: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite_output_dir: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    `llmcompressor.oneshot` with the same arguments, and some things more: ``recipe`` may be the
    name of a shipped recipe, ``dataset`` may be a text or JSON-lines file, mistakes are refused
    before anything runs, and the calibration samples are not shuffled unless asked for
    (LLM-Compressor shuffles them by an unseeded generator, so that another run may take others).
    Several processes (``torchrun``) that are given the same dataset each take a share of it.

    :param model: model, or name or path of one
    :param recipe: path, name of a shipped recipe (``"w2a16_autoround"``), YAML text, `Recipe`,
        modifier, or a list of modifiers
    :param dataset: whatever `llmcompressor.oneshot` takes, or the path of a ``.txt``, ``.json``
        or ``.jsonl`` file, which `text_dataset` cuts into samples of ``max_seq_length`` tokens
    :param output_dir: where to save; nothing is saved if None
    :param overwrite_output_dir: save into a folder that already holds files
    :param kwargs: further arguments of `llmcompressor.oneshot`
    :return: the quantized model
    :raises OutputExistsError: if ``output_dir`` holds files
    :raises RecipeError: if the recipe is not found, is empty, or has fields that do not exist
    :raises CalibrationError: if the dataset is empty
    """
    if output_dir is not None and not overwrite_output_dir:
        folder = Path(output_dir)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputExistsError(
                f"{folder} exists and is not empty; choose another `output_dir`, or pass "
                "`overwrite_output_dir=True`"
            )
    recipe = _checked(recipe)
    if isinstance(dataset, (str, Path)) and Path(dataset).is_file():
        dataset = _read_text(Path(dataset), model, kwargs)
    if isinstance(dataset, Sized) and not isinstance(dataset, str) and len(dataset) == 0:
        raise CalibrationError("the calibration dataset is empty")
    if is_distributed() and isinstance(dataset, Dataset):
        dataset = _own_share(dataset, kwargs.get("num_calibration_samples", 512))
    kwargs.setdefault("shuffle_calibration_samples", False)
    with contextlib.ExitStack() as stack:
        if _has_renamed_autoround(recipe):
            # LLM-Compressor does the same, but goes by the name of the class.
            kwargs["propagate_error"] = False
            stack.enter_context(without_error_propagation())
        return host_oneshot(
            model=model,
            recipe=recipe,
            dataset=dataset,
            output_dir=None if output_dir is None else str(output_dir),
            **kwargs,
        )


def _has_renamed_autoround(recipe: Any) -> bool:
    """:return: whether the recipe has a subclass of `AutoRoundModifier` under another name"""
    return any(
        issubclass(kind, AutoRoundModifier) and kind.__name__ != AutoRoundModifier.__name__
        for kind in recipe_classes(recipe)
    )


def _checked(recipe: Any) -> Any:
    """:return: the recipe, with names of shipped recipes resolved"""
    if recipe is None:
        raise RecipeError("no recipe: nothing would be quantized")
    if not isinstance(recipe, (str, Path)):
        return recipe
    if "\n" in str(recipe):
        check_recipe(str(recipe), "recipe")
        return recipe
    path = find_recipe(recipe)
    check_recipe(path.read_text(encoding="utf-8"), str(path))
    return str(path)


def _own_share(dataset: Dataset, num_samples: int | None) -> Dataset:
    """
    The samples of this process, where all were given the same. LLM-Compressor 0.14 means to do the
    same, but lets every process run the first share.
    """
    rank, size = process_rank()
    if len(set(gathered(dataset._fingerprint))) > 1:
        return dataset  # shared out already, as by LLM-Compressor's `get_rank_partition`
    total = min(len(dataset), num_samples or len(dataset))
    if total < size:
        raise CalibrationError(f"{total} calibration samples are too few for {size} processes")
    return dataset.select(range(total * rank // size, total * (rank + 1) // size))


def _read_text(path: Path, model: str | PreTrainedModel, kwargs: dict[str, Any]) -> Any:
    tokenizer = kwargs.get("tokenizer") or kwargs.get("processor")
    if tokenizer is None or isinstance(tokenizer, str):
        source = tokenizer or (model if isinstance(model, str) else model.config._name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=kwargs.get("trust_remote_code_model", False)
        )
    return text_dataset(
        path,
        tokenizer,
        num_samples=kwargs.get("num_calibration_samples", 512),
        max_seq_length=kwargs.get("max_seq_length") or 2048,
        text_column=kwargs.get("text_column", "text"),
    )
