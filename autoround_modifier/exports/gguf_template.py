"""The GGUF file that llama.cpp's own converter makes of a model whose weights are not quantized."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from autoround_modifier.checkpoints.saved_config import text_part
from autoround_modifier.checkpoints.saved_weights import dtype_named
from autoround_modifier.errors import ExportError, MissingExtraError

__all__ = ["LLAMA_CPP", "convert", "converter_script", "dtype_of_config"]

LLAMA_CPP = "LLAMA_CPP_ROOT"
SCRIPT = "convert_hf_to_gguf.py"
WITHOUT_VOCABULARY = Path(__file__).parent / "convert_without_vocabulary.py"
# What the converter calls the dtypes of matrices that it leaves as they are
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
MESSAGE_END = 1500


def converter_script(llama_cpp: str | os.PathLike[str] | None) -> Path:
    """
    :param llama_cpp: folder with llama.cpp's source; None for that of the environment variable
        LLAMA_CPP_ROOT
    :return: the converter in it
    :raises ExportError: if there is none
    :raises MissingExtraError: if the package `gguf` is not installed
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("exporting to GGUF", "gguf", "gguf") from error
    folder = llama_cpp or os.environ.get(LLAMA_CPP)
    if not folder:
        raise ExportError(
            "llama.cpp's converter writes the metadata and vocabulary of a GGUF file: get its "
            f"source (`git clone https://github.com/ggml-org/llama.cpp`) and set {LLAMA_CPP} to "
            "its folder"
        )
    script = Path(folder) / SCRIPT
    if not script.is_file():
        raise ExportError(
            f"{folder} has no {SCRIPT}; {LLAMA_CPP} is a folder of llama.cpp's source"
        )
    return script


def dtype_of_config(config: Mapping[str, Any]) -> torch.dtype:
    """
    :param config: ``config.json``
    :return: dtype of the model's weights
    :raises CheckpointError: if PyTorch has no such dtype
    """
    parts, keys = (config, text_part(config)), ("dtype", "torch_dtype")
    return dtype_named(next((x[key] for x in parts for key in keys if x.get(key)), None))


def convert(
    folder: Path, output: Path, dtype: torch.dtype, script: Path, *, vocabulary: bool = True
) -> None:
    """
    :param folder: of a checkpoint whose weights are not quantized
    :param output: GGUF file to write
    :param dtype: of its matrices
    :param script: see `converter_script`
    :param vocabulary: whether the file has one
    :raises ExportError: if llama.cpp's converter does not convert the model
    """
    logger.info(f"{script.name} converts the dequantized model")
    program = [str(script)] if vocabulary else [str(WITHOUT_VOCABULARY), str(script)]
    options = ["--outfile", str(output), "--outtype", DTYPES[dtype]]
    done = subprocess.run(
        [sys.executable, *program, str(folder), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not output.is_file():
        raise ExportError(
            f"llama.cpp's converter does not convert this model:\n{done.stderr[-MESSAGE_END:]}"
        )
