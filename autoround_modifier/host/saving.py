"""
Saving a model: LLM-Compressor's `save_pretrained`, what is put right after it, and a folder that
holds all of a checkpoint or none of it.

LLM-Compressor 0.14 replaces `save_pretrained` on the model by a function that compresses, saves,
copies the original's ``config.json`` and writes ``quantization_config``. It writes file by file
into the folder that it is given, so that a failure leaves a part of a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, cast

from compressed_tensors.distributed import is_source_process
from llmcompressor.transformers.compression.compressed_tensors_utils import (
    modify_save_pretrained,
    suspend_distributed_timeout,
)
from transformers import PreTrainedModel

__all__ = ["UNFINISHED_PREFIX", "finish_when_saved"]

UNFINISHED_PREFIX = ".unfinished-"
CONFIG = "config.json"
# Weights and their index, as Transformers and LLM-Compressor name them
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5}|_mtp)?\.safetensors|model\.safetensors\.index\.json")


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
        with suspend_distributed_timeout():  # other processes wait for the one that writes
            if not is_source_process():
                save(str(save_directory), *args, **kwargs)
                return
            with _written_at_once(Path(save_directory)) as unfinished:
                save(str(unfinished.path), *args, **kwargs)
                unfinished.complete = True
                cast(Any, save_and_finish)._finish(model, unfinished.path)

    cast(Any, save_and_finish)._finish = finish
    cast(Any, save_and_finish)._overridden = True  # so that LLM-Compressor replaces it no more
    model.save_pretrained = save_and_finish  # type: ignore[method-assign]


@dataclass
class _Unfinished:
    path: Path
    complete: bool = False


@contextlib.contextmanager
def _written_at_once(folder: Path) -> Iterator[_Unfinished]:
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
        if left_over.is_dir():  # of a process that was killed while it saved
            shutil.rmtree(left_over, ignore_errors=True)
    unfinished = _Unfinished(folder / f"{UNFINISHED_PREFIX}{secrets.token_hex(8)}")
    unfinished.path.mkdir()
    try:
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
    (folder / CONFIG).unlink(missing_ok=True)
    for path in folder.iterdir():
        if WEIGHTS.fullmatch(path.name):
            path.unlink()
    names = sorted(path.relative_to(source) for path in source.rglob("*") if not path.is_dir())
    for name in sorted(names, key=lambda name: name == Path(CONFIG)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(folder / name)
