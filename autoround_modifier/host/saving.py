"""
Saving a model: LLM-Compressor's `save_pretrained`, what is put right after it, and a folder that
holds all of a checkpoint or none of it.

LLM-Compressor 0.14 replaces `save_pretrained` on the model by a function that compresses, saves,
copies the original's ``config.json`` and writes ``quantization_config``. It writes file by file
into the folder that it is given, so that a failure leaves a part of a checkpoint. It copies layers
for multi-token prediction of some models, as they are stored; `modifiers/finishing.py` does so for
all.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, cast

import yaml
from compressed_tensors.compressors import compress_module
from compressed_tensors.distributed import is_source_process
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.initialize import (
    initialize_module_for_quantization,
)
from compressed_tensors.utils import patch_attr
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe.utils import append_recipe_dict, get_yaml_serializable_dict
from llmcompressor.transformers.compression import compressed_tensors_utils
from llmcompressor.transformers.compression.compressed_tensors_utils import (
    modify_save_pretrained,
    suspend_distributed_timeout,
)
from llmcompressor.transformers.utils.helpers import infer_recipe_from_model_path
from loguru import logger
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from autoround_modifier.errors import SavingError
from autoround_modifier.host.saved_format import choose_saved_format
from autoround_modifier.locks import in_use, is_in_use
from autoround_modifier.progress.events import phase

__all__ = [
    "GGUF_BLOCKS",
    "RECIPE",
    "UNFINISHED_PREFIX",
    "check_generation_config",
    "compressed_tensors_of",
    "finish_when_saved",
    "prepare_compression",
    "recipe_text",
    "written_at_once",
]

UNFINISHED_PREFIX = ".unfinished-"
RECIPE = "recipe.yaml"
# Folder beside the weights, with the blocks of layers that were tuned in types of GGUF
GGUF_BLOCKS = "gguf_blocks"
CONFIG = "config.json"
# Weights and their index, as Transformers and LLM-Compressor name them
WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5}|_mtp(_\d+)?)?\.safetensors|model\.safetensors\.index\.json"
)


def finish_when_saved(
    model: PreTrainedModel, finish: Callable[[PreTrainedModel, Path], None]
) -> None:
    """
    Let `model.save_pretrained` call ``finish`` once LLM-Compressor has saved, in the process that
    writes, before anything appears in the user's folder. Called again, ``finish`` is replaced.

    :param model: its `save_pretrained` is replaced, on the instance
    :param finish: takes the model and the folder with the saved files, and may change them. If it
        fails, the files are kept, and the error is raised
    """
    modify_save_pretrained(model)
    save = cast(Any, model.save_pretrained)
    if hasattr(save, "_finish"):
        save._finish = finish
        return

    @wraps(save)
    def save_and_finish(save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "`push_to_hub=True` would upload the model before its `quantization_config` is "
                "written. Save it to a folder, and upload that: "
                "`huggingface_hub.upload_folder(folder_path=..., repo_id=...)`"
            )
        # other processes wait for the one that writes
        with phase("saving"), suspend_distributed_timeout():
            if not is_source_process():
                save(str(save_directory), *args, **kwargs)
                return
            with written_at_once(Path(save_directory)) as unfinished:
                with (
                    _savable_generation_config(model),
                    _no_mtp_layers(),
                    _one_decompression(model),
                ):
                    save(str(unfinished.path), *args, **kwargs)
                unfinished.complete = True
                cast(Any, save_and_finish)._finish(model, unfinished.path)

    cast(Any, save_and_finish)._finish = finish
    cast(Any, save_and_finish)._overridden = True  # so that LLM-Compressor replaces it no more
    model.save_pretrained = save_and_finish  # type: ignore[method-assign]


def check_generation_config(model: PreTrainedModel) -> None:
    """
    Llama-2-chat and Vicuna are released with ``temperature`` and without ``do_sample``, which
    Transformers refuses to save: sampling is meant, and is saved.

    :raises SavingError: if its `generation_config` cannot be saved
    """
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return
    try:
        repaired = _repaired(config)
    except ValueError as error:
        raise SavingError(
            f"`model.generation_config` could not be saved with the model. {error}\nCorrect it "
            "before the run, such as by `model.generation_config.temperature = None`."
        ) from error
    if repaired is not config:
        logger.warning(
            "the model's generation_config sets how to sample, without `do_sample`: "
            "generation_config.json will have `do_sample: true`"
        )


def _repaired(config: GenerationConfig) -> GenerationConfig:
    """
    :return: what can be saved
    :raises ValueError: if setting `do_sample` does not suffice
    """
    try:
        config.validate(strict=True)
        return config
    except ValueError as error:
        sampling = copy.deepcopy(config)
        sampling.do_sample = True
        try:
            sampling.validate(strict=True)
        except ValueError:
            raise error from None
        return sampling


@contextlib.contextmanager
def _savable_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """In memory, how the model generates does not change."""
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        yield
        return
    with contextlib.suppress(ValueError):  # saving raises it
        model.generation_config = _repaired(config)
    try:
        yield
    finally:
        model.generation_config = config


@contextlib.contextmanager
def _one_decompression(model: PreTrainedModel) -> Iterator[None]:
    """
    Each time that compressed-tensors compresses a model, it lets the next forward pass decompress
    it. Of two such hooks the second finds nothing to decompress, and fails.
    """
    earlier = getattr(model, "ct_decompress_hook", None)
    yield
    if earlier is not None and getattr(model, "ct_decompress_hook", None) is not earlier:
        earlier.remove()


def _no_mtp_layers() -> contextlib.AbstractContextManager[None]:
    """Keep LLM-Compressor from copying them."""
    name = "save_mtp_tensors_to_checkpoint"
    return patch_attr(compressed_tensors_utils, name, lambda *args, **kwargs: None)


def recipe_text(modifiers: Sequence[Modifier], stage: str, source: str) -> str:
    """
    The text of a recipe that runs all of the modifiers again. LLM-Compressor writes one group, in
    which of two modifiers of one class the last one remains.

    :param modifiers: that ran, in their order
    :param stage: name of their stage
    :param source: folder or name of the model, whose recipe comes first if it has one
    :return: YAML
    """
    groups: list[list[Modifier]] = []
    for modifier in modifiers:
        if not groups or type(modifier) in map(type, groups[-1]):
            groups.append([])
        groups[-1].append(modifier)
    merged: dict[str, Any] = {}
    for index, group in enumerate(groups):
        (parts,) = get_yaml_serializable_dict(group, stage).values()
        for name, fields in parts.items():
            known = name.removesuffix("_modifiers")
            key = name if name not in merged else f"{known}_{index}_modifiers"
            merged[key] = fields
    recipe = {f"{stage}_stage": merged}
    earlier = infer_recipe_from_model_path(source)
    if earlier:
        recipe = append_recipe_dict(yaml.safe_load(Path(earlier).read_text()), recipe)
    # Named tuples of other modifiers would become tags, which no safe loader reads.
    plain = json.loads(json.dumps(recipe, default=str))
    return yaml.safe_dump(plain, allow_unicode=True, sort_keys=False, width=88)


def prepare_compression(layer: nn.Module, scheme: QuantizationScheme) -> None:
    """
    Give a layer that is not part of a model the scale of its scheme.

    :param layer: linear, with its weight
    :param scheme: updated with the format in which it is saved
    """
    choose_saved_format(scheme)
    layer.quantization_scheme = scheme
    initialize_module_for_quantization(layer, scheme)


def compressed_tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """
    :param layer: with a weight that its scale fits exactly (`write_back`)
    :return: what compressed-tensors saves of it
    """
    compress_module(layer)
    return {name: tensor.detach() for name, tensor in layer.state_dict().items()}


@dataclass
class Unfinished:
    """
    :ivar path: folder to write to
    :ivar complete: set it once all files are written
    """

    path: Path
    complete: bool = False


@contextlib.contextmanager
def written_at_once(folder: Path) -> Iterator[Unfinished]:
    """
    Yields a folder inside of ``folder`` to write to. Once that is complete, its files take their
    places: weights of an earlier checkpoint go, other files of the user stay, and ``config.json``,
    without which nothing loads, comes last. Files are renamed, not copied. If it is not complete,
    ``folder`` is left as it was.

    :raises OSError: if the folder cannot be made or written to
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{UNFINISHED_PREFIX}*"):
        # of a process that was killed while it saved
        if left_over.is_dir() and not is_in_use(left_over):
            shutil.rmtree(left_over, ignore_errors=True)
    unfinished = Unfinished(folder / f"{UNFINISHED_PREFIX}{secrets.token_hex(8)}")
    unfinished.path.mkdir()
    try:
        with in_use(unfinished.path):
            yield unfinished
    finally:
        try:
            if unfinished.complete:
                _move_into_place(unfinished.path, folder)
        finally:
            shutil.rmtree(unfinished.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody wrote into it
                if not unfinished.complete:
                    for path in made:
                        path.rmdir()


def _move_into_place(source: Path, folder: Path) -> None:
    """Let the files of ``source`` replace those of the checkpoint in ``folder``."""
    mode = stat.S_IMODE((source / CONFIG).stat().st_mode)  # safetensors lets the owner alone read
    (folder / CONFIG).unlink(missing_ok=True)
    for path in (*folder.iterdir(), *(folder / GGUF_BLOCKS).glob("*.safetensors")):
        if WEIGHTS.fullmatch(path.name) or path.parent.name == GGUF_BLOCKS:
            path.unlink()
    names = sorted(path.relative_to(source) for path in source.rglob("*") if not path.is_dir())
    for name in sorted(names, key=lambda name: name == Path(CONFIG)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).chmod(mode)
        (source / name).replace(folder / name)
