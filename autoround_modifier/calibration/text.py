"""Calibration text: from a file, or written by the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from autoround_modifier.errors import CalibrationError

__all__ = ["self_generated", "text_dataset"]


def text_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 128,
    max_seq_length: int = 2048,
    text_column: str = "text",
    **match: str,
) -> Dataset:
    """
    Samples of equal length from a text file, with nothing truncated away: every document is cut
    into pieces of ``max_seq_length`` tokens, and the pieces of all documents take turns, so that
    few samples still come from many documents.

    :param path: ``.jsonl`` or ``.json`` (one object per line, each a document), or any other file
        as one document of plain text
    :param tokenizer: of the model to calibrate
    :param num_samples: largest number of samples
    :param max_seq_length: tokens in each sample
    :param text_column: field of a JSON line that holds the text
    :param match: keep only JSON lines with these values, for example ``split="calib"``
    :return: dataset with ``input_ids`` and ``attention_mask``, which `oneshot` takes as it is
    :raises CalibrationError: if no document has ``max_seq_length`` tokens
    """
    pieces: list[list[list[int]]] = []  # per document
    for document in _documents(Path(path), text_column, match):
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        full = len(ids) // max_seq_length
        pieces.append(
            [ids[start * max_seq_length : (start + 1) * max_seq_length] for start in range(full)]
        )
    rounds = max((len(document) for document in pieces), default=0)
    samples = [
        document[index] for index in range(rounds) for document in pieces if index < len(document)
    ]
    if not samples:
        raise CalibrationError(
            f"{path}: none of {len(pieces)} documents has {max_seq_length} tokens. Use a smaller "
            "`max_seq_length` or longer documents."
        )
    return _dataset(samples[:num_samples])


@torch.no_grad()
def self_generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 128,
    max_seq_length: int = 512,
    batch_size: int = 32,
    seed: int = 42,
) -> Dataset:
    """
    Text that the full-precision model writes itself, for machines without calibration data:
    each sample starts with a random token of the vocabulary and is sampled from the model's own
    distribution (LLM-QAT, https://arxiv.org/abs/2305.17888).

    :param model: full-precision causal language model
    :param tokenizer: its tokenizer
    :param num_samples: number of samples
    :param max_seq_length: tokens in each sample; generation costs one forward pass per token
        and batch
    :param batch_size: samples generated together
    :param seed: fixes the text; the global random state is left as it was
    :return: dataset with ``input_ids`` and ``attention_mask``, which `oneshot` takes as it is
    """
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    first = ordinary[torch.randint(len(ordinary), (num_samples, 1), generator=generator)]

    samples: list[Tensor] = []
    devices = [model.device] if model.device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=model.device.type):
        torch.manual_seed(seed)
        for start in tqdm(range(0, num_samples, batch_size), desc="Generating calibration text"):
            prompt = first[start : start + batch_size].to(model.device)
            generated = model.generate(  # type: ignore[operator]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=max_seq_length - 1,  # an end of text does not end the sample
                max_new_tokens=max_seq_length - 1,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
            samples.append(generated.cpu())
    return _dataset(torch.cat(samples).tolist())


def _dataset(samples: list[list[int]]) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": samples, "attention_mask": [[1] * len(sample) for sample in samples]}
    )


def _documents(path: Path, text_column: str, match: dict[str, str]) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        if path.suffix not in (".json", ".jsonl"):
            yield file.read()
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            record = json.loads(line)
            if any(record.get(key) != value for key, value in match.items()):
                continue
            if text_column not in record:
                raise CalibrationError(
                    f"{path}:{number}: no field `{text_column}`; this line has "
                    f"{sorted(record)}. Name the right one with `text_column`."
                )
            yield record[text_column]
