"""`oneshot`: LLM-Compressor's own, with shipped recipes by name and early refusal of mistakes."""

from __future__ import annotations

import os
from collections.abc import Sized
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from loguru import logger
from torch import nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel

from autoround_modifier.calibration import text_dataset
from autoround_modifier.errors import CalibrationError, RecipeError
from autoround_modifier.host.applied_schemes import disable_unfinished
from autoround_modifier.host.layers import weight_folders
from autoround_modifier.host.lifecycle import (
    AUTOROUND_CLASS_NAME,
    Recipe,
    as_recipe,
    host_oneshot,
    running_model,
)
from autoround_modifier.host.shared_state import (
    SHARED_STATE_PIPELINE,
    blocks_share_state,
    config_shares_state,
)
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.validation import check_not_quantized
from autoround_modifier.parallel import gathered, is_distributed, process_rank
from autoround_modifier.recipes import check_recipe, find_recipe
from autoround_modifier.runs.output_folder import check_output_folder

__all__ = ["oneshot"]


def oneshot(
    model: str | PreTrainedModel,
    recipe: Any = None,
    dataset: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite_output_dir: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    `llmcompressor.oneshot` with the same arguments, and some things more: ``recipe`` may be the
    name of a shipped recipe, ``dataset`` may be a text or JSON-lines file, mistakes are refused
    before anything runs, and the calibration samples are not shuffled unless asked for
    (LLM-Compressor shuffles them by an unseeded generator, so that another run may take others).
    Several processes (``torchrun``) that are given the same dataset each take a share of it. Where
    blocks of the model share keys and values, ``pipeline`` is ``basic`` unless another is given,
    which is refused. A run that stops, by Ctrl-C too, leaves no hooks, and says what is kept.

    :param model: model, or name or path of one
    :param recipe: path, name of a shipped recipe (``"w2a16_autoround"``), YAML text, `Recipe`,
        modifier, or a list of modifiers
    :param dataset: whatever `llmcompressor.oneshot` takes, or the path of a ``.txt``, ``.json``
        or ``.jsonl`` file, which `text_dataset` cuts into samples of ``max_seq_length`` tokens
    :param output_dir: where to save; nothing is saved if None
    :param overwrite_output_dir: save into a folder that already holds files; never into the one
        that the model comes from
    :param token: for the Hugging Face Hub, where a tokenizer or processor is loaded by name
    :param local_files_only: load tokenizer and processor from this machine only
    :param kwargs: further arguments of `llmcompressor.oneshot`, such as ``model_revision`` and
        ``trust_remote_code_model``, which apply to tokenizer and processor as well
    :return: the quantized model
    :raises OutputExistsError: if ``output_dir`` holds files, or the original model
    :raises OSError: if ``output_dir`` cannot be made or written to
    :raises ValueError: if ``token`` or ``local_files_only`` is given with the name of a model on
        the Hub, which LLM-Compressor loads without them
    :raises RecipeError: if the recipe is not found, is empty, or has fields that do not exist, if
        its modifiers ran before, or if the model is quantized already
    :raises CalibrationError: if the dataset is empty
    """
    if output_dir is not None:
        check_output_folder(Path(output_dir), overwrite_output_dir, _source_folders(model))
    recipe = _checked(recipe)
    recipe = as_recipe(recipe, kwargs.get("stage"))
    for modifier in recipe.modifiers:
        if modifier.initialized_:
            raise RecipeError(
                f"this {type(modifier).__name__} ran before; make a new one for another run"
            )
        if isinstance(modifier, AutoRoundModifier) and (
            type(modifier).__name__ != AUTOROUND_CLASS_NAME
        ):
            # For the class of that name LLM-Compressor does this itself.
            kwargs["propagate_error"] = False
            modifier.run_without_error_propagation()
    if isinstance(model, nn.Module):
        folders = [x.checkpoint_dir for x in recipe.modifiers if isinstance(x, AutoRoundModifier)]
        check_not_quantized(model, next(filter(None, folders), None))
    hub = {"token": token, "local_files_only": local_files_only}
    if token is not None or local_files_only:
        _load_processor(model, kwargs, hub)
    if isinstance(dataset, (str, Path)) and Path(dataset).is_file():
        dataset = _read_text(Path(dataset), model, kwargs, hub)
    if isinstance(dataset, Sized) and not isinstance(dataset, str) and len(dataset) == 0:
        raise CalibrationError("the calibration dataset is empty")
    if is_distributed() and isinstance(dataset, Dataset):
        dataset = _own_share(dataset, kwargs.get("num_calibration_samples", 512))
    kwargs.setdefault("shuffle_calibration_samples", False)
    if any(modifier.requires_calibration_data for modifier in recipe.modifiers):
        _choose_pipeline(model, kwargs)
    try:
        return host_oneshot(
            model=model,
            recipe=recipe,
            dataset=dataset,
            output_dir=None if output_dir is None else str(output_dir),
            **kwargs,
        )
    except BaseException:  # Ctrl-C among them, which may come while code of others runs
        _clean_up(recipe)
        raise


def _choose_pipeline(model: str | PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """
    :param kwargs: of `oneshot`; ``pipeline`` may be set
    :raises RecipeError: if the model cannot run in the pipeline that is asked for
    """
    if isinstance(model, (str, Path)):
        config = AutoConfig.from_pretrained(
            model,
            revision=kwargs.get("model_revision", "main"),
            trust_remote_code=kwargs.get("trust_remote_code_model", False),
        )
        if not config_shares_state(config):
            return
    elif not blocks_share_state(model):
        return
    pipeline = kwargs.setdefault("pipeline", SHARED_STATE_PIPELINE)
    if pipeline != SHARED_STATE_PIPELINE:
        raise RecipeError(
            "blocks of this model share keys and values, which LLM-Compressor's pipeline "
            f"`{pipeline}` does not pass on; leave `pipeline` out (or give "
            f"`{SHARED_STATE_PIPELINE}`)"
        )
    logger.info(
        f"blocks of this model share keys and values: the pipeline is `{SHARED_STATE_PIPELINE}`, "
        "which keeps the inputs and outputs of all blocks in memory until the last has run"
    )


def _clean_up(recipe: Recipe) -> None:
    """Leave the model of a run that has stopped without hooks, and able to run."""
    for modifier in recipe.modifiers:
        if isinstance(modifier, AutoRoundModifier):
            modifier.clean_up()
        modifier.remove_hooks()
    model = running_model()
    if model is not None:
        disable_unfinished(model)


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


def _source_folders(model: str | PreTrainedModel) -> set[Path]:
    """:return: folders on this machine from which the model was, or still is, read"""
    if isinstance(model, (str, Path)):
        return {Path(model)} if Path(model).is_dir() else set()
    name = model.config._name_or_path
    named = {Path(name)} if name and Path(name).is_dir() else set()
    return named | weight_folders(model)


def _load_processor(
    model: str | PreTrainedModel, kwargs: dict[str, Any], hub: dict[str, Any]
) -> None:
    """
    Load what LLM-Compressor would load without ``token`` and ``local_files_only``.

    :param kwargs: of `oneshot`; ``processor`` is set, ``tokenizer`` is removed
    :param hub: the two arguments
    :raises ValueError: if the model itself is to be loaded from the Hub
    """
    if isinstance(model, str) and not Path(model).is_dir():
        raise ValueError(
            f"LLM-Compressor loads `{model}` without `token` and `local_files_only`. Load the "
            "model by `from_pretrained`, which takes both, and pass it to `oneshot`."
        )
    processor = kwargs.pop("tokenizer", None) or kwargs.get("processor")
    if processor is None or isinstance(processor, str):
        source = _processor_source(processor, model, kwargs)
        processor = AutoProcessor.from_pretrained(**source, **hub)
    kwargs["processor"] = processor


def _read_text(
    path: Path, model: str | PreTrainedModel, kwargs: dict[str, Any], hub: dict[str, Any]
) -> Any:
    tokenizer = kwargs.get("tokenizer") or kwargs.get("processor")
    if tokenizer is None or isinstance(tokenizer, str):
        source = _processor_source(tokenizer, model, kwargs)
        tokenizer = AutoTokenizer.from_pretrained(**source, **hub)
    return text_dataset(
        path,
        tokenizer,
        num_samples=kwargs.get("num_calibration_samples", 512),
        max_seq_length=kwargs.get("max_seq_length") or 2048,
        text_column=kwargs.get("text_column", "text"),
    )


def _processor_source(
    name: str | None, model: str | PreTrainedModel, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """
    :param name: what the user named, or None
    :return: arguments of `from_pretrained`
    :raises CalibrationError: if nothing is named, and the model does not come from where its
        config says. A config is data from somebody else; what it names is not fetched.
    """
    arguments = {"trust_remote_code": kwargs.get("trust_remote_code_model", False)}
    if name is not None:
        return {"pretrained_model_name_or_path": name, **arguments}
    revision = kwargs.get("model_revision")
    if isinstance(model, (str, Path)):
        source = str(model)
    else:
        source = model.config._name_or_path
        revision = revision or getattr(model.config, "_commit_hash", None)
        if not _was_loaded_from(source, revision):
            raise CalibrationError(
                f"no tokenizer: the model is in memory, and `{source}`, which its config names, is "
                "neither a folder nor a model that was downloaded to this machine. Pass "
                "`tokenizer=`."
            )
    return {"pretrained_model_name_or_path": source, "revision": revision or "main", **arguments}


def _was_loaded_from(name: str, revision: str | None) -> bool:
    """:return: whether it is a folder, or the Hub's cache has the config of a model of that name"""
    if not name:
        return False
    if Path(name).is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except ValueError:  # it cannot be the name of a model
        return False
