"""Calibration text that the model writes itself."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from autoround_modifier.calibration.tokens import Sample, first_tokens, token_dataset
from autoround_modifier.errors import CalibrationError
from autoround_modifier.runs.events import phase
from autoround_modifier.runs.progress import Progress

__all__ = ["self_generated"]


@torch.no_grad()
def self_generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int = 128,
    max_seq_length: int = 512,
    batch_size: int = 32,
    seed: int = 42,
    add_bos_token: bool | None = None,
) -> Dataset:
    """
    Text that the full-precision model writes itself, for machines without calibration data:
    each sample starts with a random token of the vocabulary, after BOS if the tokenizer begins
    texts with it, and is sampled from the model's own distribution (LLM-QAT,
    https://arxiv.org/abs/2305.17888).

    :param model: full-precision causal language model
    :param tokenizer: its tokenizer
    :param num_samples: number of samples
    :param max_seq_length: tokens in each sample; generation costs one forward pass per token
        and batch
    :param batch_size: samples generated together
    :param seed: fixes the text; the global random state is left as it was
    :param add_bos_token: whether each sample begins with BOS; None does what the tokenizer does
    :return: dataset with ``input_ids`` and ``attention_mask``, which `oneshot` takes as it is
    :raises CalibrationError: if no sample, or none longer than its first tokens, is asked for
    """
    special = set(tokenizer.all_special_ids)
    # A tokenizer may know more tokens than the model: Gemma 3 has one for images.
    weight: Any = model.get_input_embeddings().weight
    known = min(len(tokenizer), len(weight))
    ordinary = torch.tensor([i for i in range(known) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    first = ordinary[torch.randint(len(ordinary), (num_samples, 1), generator=generator)]
    bos = torch.tensor([first_tokens(tokenizer, add_bos_token)], dtype=first.dtype)
    prompts = torch.cat([bos.expand(num_samples, -1), first], dim=1)
    new_tokens = max_seq_length - prompts.shape[1]
    if num_samples < 1 or new_tokens < 1:
        raise CalibrationError(
            f"self_generated: {num_samples} samples of {max_seq_length} tokens; use at least 1 of "
            f"{prompts.shape[1] + 1}"
        )

    samples: list[Tensor] = []
    devices = [model.device] if model.device.type != "cpu" else []
    batches = prompts.split(batch_size)
    progress = Progress(
        "generation", num_samples * new_tokens, title="Calibration text", unit="token"
    )
    with (
        phase("generation"),
        contextlib.closing(progress),
        torch.random.fork_rng(devices=devices, device_type=model.device.type),
    ):
        torch.manual_seed(seed)
        for batch in batches:
            prompt = batch.to(model.device)
            generated = model.generate(  # type: ignore[operator]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=new_tokens,  # an end of text does not end the sample
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                stopping_criteria=StoppingCriteriaList([_Progress(progress)]),
            )
            samples.append(generated.cpu())
    return token_dataset([Sample(ids) for ids in torch.cat(samples).tolist()])


class _Progress(StoppingCriteria):
    """Advances a progress bar by each generated token; never stops the generation."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self._progress.advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
