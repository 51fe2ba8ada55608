"""`oneshot`: LLM-Compressor's own, with shipped recipes by name and early refusal of mistakes."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from loguru import logger
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from autoround_modifier.calibration import (
    HubAccess,
    PaddedBatch,
    check_text_name,
    is_text_source,
    model_columns,
    read_samples,
)
from autoround_modifier.defaults import MAX_SEQ_LENGTH
from autoround_modifier.errors import CalibrationError, ExportError, RecipeError
from autoround_modifier.host.applied_schemes import disable_unfinished
from autoround_modifier.host.failures import explain_failure
from autoround_modifier.host.layers import weight_folders
from autoround_modifier.host.lifecycle import (
    AUTOROUND_CLASS_NAME,
    Recipe,
    as_recipe,
    host_oneshot,
    running_model,
)
from autoround_modifier.host.loading import (
    check_not_compressed,
    load_model,
    model_positions,
    source_config,
    stored_format,
)
from autoround_modifier.host.registered_datasets import (
    is_registered_dataset,
    registered_datasets,
)
from autoround_modifier.host.shared_state import (
    SHARED_STATE_PIPELINE,
    blocks_share_state,
    config_shares_state,
)
from autoround_modifier.modifiers.auto_round import AutoRoundModifier
from autoround_modifier.modifiers.samples import samples_of_the_pass
from autoround_modifier.modifiers.shape_checks import check_formats
from autoround_modifier.modifiers.validation import check_not_quantized
from autoround_modifier.parallel import (
    gathered,
    is_distributed,
    is_source_process,
    process_rank,
)
from autoround_modifier.recipe_files import find_recipe, read_recipe, recipe_name
from autoround_modifier.recipes import check_recipe
from autoround_modifier.report.outdated import remove_outdated
from autoround_modifier.report.recorder import RunRecorder, recording
from autoround_modifier.run_outputs import RunOutputs, read_formats

__all__ = ["check_dataset_name", "load_tokenizer", "oneshot", "source_folders"]


def oneshot(
    model: str | PreTrainedModel,
    recipe: Any = None,
    dataset: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite_output_dir: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
    check_generation: bool = True,
    formats: str | Sequence[str] | None = None,
    llama_cpp: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    `llmcompressor.oneshot` with the same arguments, and some things more: ``recipe`` may be the
    name of a shipped recipe, ``dataset`` may be text of many kinds, mistakes are refused before
    anything runs, and the calibration samples are not shuffled unless asked for
    (LLM-Compressor shuffles them by an unseeded generator, so that another run may take others).
    Several processes (``torchrun``) that are given the same dataset each take a share of it. A
    model that is released in FP8 or MXFP4 is dequantized as it is loaded. Where blocks of the model
    share keys and values, ``pipeline`` is ``basic`` unless another is given, which is refused.
    Where scale distillation takes more samples than the other modifiers use, the blocks run no more
    than those. A run that stops, by Ctrl-C too, leaves no hooks, and says what is kept. What was
    done is saved beside the model as ``quantization_report.json``.

    :param model: model, or name or path of one
    :param recipe: path, name of a shipped recipe (``"w2a16_autoround"``), YAML text, `Recipe`,
        modifier, or a list of modifiers
    :param dataset: whatever `llmcompressor.oneshot` takes, or a ``source`` of `text_dataset`: text
        or conversations in a file, a folder, a dataset, a list, or a mixture of them, of which it
        makes ``num_calibration_samples`` samples of ``max_seq_length`` tokens (512 and 2048)
    :param output_dir: where to save; nothing is saved if None
    :param overwrite_output_dir: save into a folder that already holds files; never into the one
        that the model comes from
    :param token: for the Hugging Face Hub, where a tokenizer or processor is loaded by name
    :param local_files_only: load tokenizer and processor from this machine only
    :param check_generation: let the model continue the beginning of a calibration sample before
        and after the run, and warn if only the quantized one repeats a single token
    :param formats: to write to ``output_dir``: ``compressed-tensors`` and those of `export`, as a
        list, or as text with commas. One format takes the folder; of several, each has a folder of
        its own in it. What a format cannot hold is refused before the run. None for
        ``compressed-tensors``
    :param llama_cpp: for GGUF, see `export`
    :param kwargs: further arguments of `llmcompressor.oneshot`, such as ``model_revision`` and
        ``trust_remote_code_model``, which apply to tokenizer and processor as well; and, for text,
        ``packing``, ``add_bos_token`` and ``assistant_only_loss`` of `text_dataset`
    :return: the quantized model
    :raises OutputExistsError: if ``output_dir`` holds files, or the original model
    :raises OSError: if ``output_dir`` cannot be made or written to
    :raises ValueError: if ``token`` or ``local_files_only`` is given with the name of a model on
        the Hub, which LLM-Compressor loads without them
    :raises RecipeError: if the recipe is not found, is empty, or has fields that do not exist, if
        its modifiers ran before, or if the model is quantized already
    :raises CalibrationError: if the dataset is empty, or holds nothing that can calibrate
    :raises CompressedSourceError: if the model is compressed already
    :raises ExportError: if there is no such format, if it cannot hold what the recipe makes, or if
        ``output_dir`` is None
    :raises FailedError: if an export failed after the run: the checkpoint is kept, and the message
        says how to go on
    """
    recorder = RunRecorder(
        recipe_name=recipe_name(recipe),
        dataset=str(dataset) if isinstance(dataset, (str, Path)) else None,
    )
    revision = kwargs.get("model_revision")
    stored = _stored_format(model, revision)
    check_not_compressed(model, stored)
    outputs = _outputs(output_dir, formats)
    if outputs is not None:
        outputs.check(overwrite_output_dir, source_folders(model), llama_cpp)
    recipe = _checked(recipe)
    recipe = as_recipe(recipe, kwargs.get("stage"))
    if outputs is not None and outputs.exports:
        _check_formats(model, recipe, list(outputs.exports), kwargs)
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
    if isinstance(dataset, Sized) and not isinstance(dataset, str) and len(dataset) == 0:
        raise CalibrationError("the calibration dataset is empty")
    dataset = _samples(dataset, model, kwargs, hub)
    if is_distributed() and isinstance(dataset, Dataset):
        dataset = _own_share(dataset, kwargs.get("num_calibration_samples", 512))
    kwargs.setdefault("shuffle_calibration_samples", False)
    dataset = samples_of_the_pass(dataset, recipe.modifiers, kwargs)
    if any(modifier.requires_calibration_data for modifier in recipe.modifiers):
        _choose_pipeline(model, kwargs)
    if stored is not None:
        model = load_model(
            str(model),
            revision=revision,
            dtype=kwargs.get("precision", "auto"),
            trust_remote_code=kwargs.get("trust_remote_code_model", False),
        )
    last = recipe.modifiers[-1] if recipe.modifiers else None
    if check_generation and isinstance(last, AutoRoundModifier):
        last.check_generation()
    try:
        with recording(recorder):
            quantized = host_oneshot(
                model=model,
                recipe=recipe,
                dataset=dataset,
                output_dir=None if outputs is None else str(outputs.checkpoint),
                **kwargs,
            )
    except BaseException as error:  # Ctrl-C among them, which may come while code of others runs
        _clean_up(recipe)
        name = model if isinstance(model, str) else type(model).__name__
        explained = explain_failure(error, str(name))
        if explained is not None:
            raise RecipeError(explained) from error
        raise
    if outputs is not None and is_source_process():
        if overwrite_output_dir:
            remove_outdated(outputs.checkpoint)
        outputs.export_all(overwrite_output_dir, llama_cpp)
    return quantized


def _outputs(
    output_dir: str | os.PathLike[str] | None, formats: str | Sequence[str] | None
) -> RunOutputs | None:
    """
    :return: None where nothing is saved
    :raises ExportError: see `oneshot`
    """
    names = read_formats(formats)
    if output_dir is not None:
        return RunOutputs.of(Path(output_dir), names)
    if formats is not None:
        raise ExportError(f"{', '.join(names)} cannot be written without `output_dir`")
    return None


def _check_formats(
    model: str | Path | PreTrainedModel, recipe: Recipe, formats: list[str], kwargs: dict[str, Any]
) -> None:
    """:raises ExportError: if a format cannot hold what the recipe makes of the model"""
    trust_remote_code = kwargs.get("trust_remote_code_model", False)
    if isinstance(model, (str, Path)):
        config = AutoConfig.from_pretrained(
            model,
            revision=kwargs.get("model_revision", "main"),
            trust_remote_code=trust_remote_code,
        )
    else:
        config = model.config
    check_formats(config, copy.deepcopy(recipe.modifiers), formats, trust_remote_code)


def _stored_format(model: str | Path | PreTrainedModel, revision: str | None) -> str | None:
    """:return: of a name: how the weights are stored, None for plain weights"""
    if isinstance(model, (str, Path)):
        with contextlib.suppress(OSError):  # LLM-Compressor says that there is no such model
            return stored_format(source_config(model, revision), model, revision)
    return None


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
    check_recipe(read_recipe(path), str(path))
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


def source_folders(model: str | PreTrainedModel) -> set[Path]:
    """:return: folders on this machine from which the model was, or still is, read"""
    name = str(model) if isinstance(model, (str, Path)) else model.config._name_or_path
    named = {Path(name)} if name and Path(name).is_dir() else _snapshot(name)
    return named if isinstance(model, (str, Path)) else named | weight_folders(model)


def _snapshot(name: str) -> set[Path]:
    """:return: the folder in the Hub's cache that holds a model of that name, if there is one"""
    try:
        config = try_to_load_from_cache(name, "config.json") if name else None
    except ValueError:  # it cannot be the name of a model
        return set()
    return {Path(config).parent} if isinstance(config, str) else set()


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


def check_dataset_name(name: str) -> None:
    """
    :param name: ``dataset`` of `oneshot`, not yet read
    :raises CalibrationError: if there is no such file or folder, and no dataset can have that name
    """
    if is_text_source(name):
        check_text_name(name)
    elif not is_registered_dataset(name):
        raise CalibrationError(
            f"calibration data: no file or folder `{name}`; datasets on the Hugging Face Hub are "
            f"named OWNER/NAME, and LLM-Compressor knows {', '.join(registered_datasets())}"
        )


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """
    :param name: of a model, or its folder
    :param kwargs: further arguments of `AutoTokenizer.from_pretrained`
    :raises CalibrationError: if it has no tokenizer that can be loaded
    """
    try:
        return AutoTokenizer.from_pretrained(pretrained_model_name_or_path=name, **kwargs)
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0]
        raise CalibrationError(f"the tokenizer of {name} cannot be loaded: {reason}") from error


def _samples(
    dataset: Any, model: str | PreTrainedModel, kwargs: dict[str, Any], hub: dict[str, Any]
) -> Any:
    """
    Make samples of token ids where the dataset is of text.

    :param kwargs: of `oneshot`; those that only `text_dataset` knows are removed, and those that
        LLM-Compressor needs to take all samples as they are added
    :param hub: arguments for the Hugging Face Hub
    """
    options = {
        name: kwargs.pop(name)
        for name in ("packing", "add_bos_token", "assistant_only_loss")
        if name in kwargs
    }
    if isinstance(dataset, (list, tuple)) and all(
        isinstance(row, Mapping) and "input_ids" in row for row in dataset
    ):
        dataset = Dataset.from_list([dict(row) for row in dataset])
    # LLM-Compressor applies a function of the user's and reads what that gives.
    is_text = kwargs.get("preprocessing_func") is None and is_text_source(
        dataset, kwargs.get("text_column")
    )
    if isinstance(dataset, str) and kwargs.get("preprocessing_func") is None:
        check_dataset_name(dataset)
    if not is_text:
        if options:
            raise CalibrationError(
                f"`{'`, `'.join(options)}` apply to text that is tokenized here, not to this "
                "dataset"
            )
        if isinstance(dataset, Dataset) and "input_ids" in dataset.column_names:
            dataset = model_columns(dataset)
            _take_all_of(dataset, kwargs)
        return dataset

    processor = kwargs.get("tokenizer") or kwargs.get("processor")
    if processor is None or isinstance(processor, str):
        source = _processor_source(processor, model, kwargs)
        processor = load_tokenizer(source.pop("pretrained_model_name_or_path"), **source, **hub)
    max_seq_length = kwargs.get("max_seq_length")
    if max_seq_length is None and not isinstance(model, (str, Path)):
        max_seq_length = min(MAX_SEQ_LENGTH, model_positions(model.config) or MAX_SEQ_LENGTH)
    split = kwargs.get("splits")
    if isinstance(split, dict):
        split = split.get("calibration")
    samples = read_samples(
        dataset,
        processor,
        kwargs.get("num_calibration_samples"),
        max_seq_length,
        default_samples=512,
        text_column=kwargs.get("text_column"),
        name=kwargs.get("dataset_config_name"),
        split=split,
        hub=HubAccess(**hub),
        **options,
    )
    kwargs["num_calibration_samples"] = len(samples)
    _take_all_of(samples, kwargs)
    return samples


def _take_all_of(samples: Dataset, kwargs: dict[str, Any]) -> None:
    """
    Let LLM-Compressor take samples as they are: with their loss mask, and padded in a batch where
    it would cut them.

    :param kwargs: of `oneshot`; what the user set stays
    """
    if "loss_mask" in samples.column_names:
        kwargs.setdefault("use_loss_mask", True)
    if kwargs.get("batch_size", 1) > 1 and PaddedBatch.fits(samples.column_names):
        kwargs.setdefault("data_collator", PaddedBatch(kwargs.get("max_seq_length")))


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
