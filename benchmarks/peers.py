"""
The other ways to quantize that `accuracy.py` compares with. Each leaves the model with its
quantized weights, dequantized, and returns the settings it ran with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llmcompressor
import torch
from auto_round import AutoRound  # the peer; the package itself never imports it
from datasets import Dataset
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier as BuiltInAutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from torch import nn
from transformers import PreTrainedTokenizerBase

__all__ = ["PEERS", "Task"]


@dataclass
class Task:
    """
    :param dataset: calibration samples of equal length
    :param weights: fields of compressed-tensors' `QuantizationArgs`
    :param seed: fixes the peer's random choices, where it has a way to
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    weights: dict[str, Any]
    batch_size: int
    seed: int


def auto_round(task: Task, **options: Any) -> dict[str, Any]:
    """Intel's library by itself; ``iters``, ``lr`` and ``enable_alg_ext`` are its own arguments."""
    tokens = torch.tensor(task.dataset["input_ids"])
    settings = {
        "scheme": "W4A16",  # the fields below override all of it
        "bits": task.weights["num_bits"],
        "sym": task.weights["symmetric"],
        "group_size": task.weights["group_size"],
        "batch_size": task.batch_size,
        "nsamples": len(tokens),
        "seqlen": tokens.shape[1],
        "seed": task.seed,
        **options,
    }
    rounder = AutoRound(
        task.model,
        tokenizer=task.tokenizer,
        dataset=list(tokens.split(task.batch_size)),
        device_map="cpu",
        **settings,
    )
    rounder.quantize()
    return settings


def built_in_auto_round(task: Task, **options: Any) -> dict[str, Any]:
    """LLM-Compressor's own modifier, a wrapper around Intel's library."""
    settings = {"batch_size": task.batch_size, **options}
    _oneshot(task, BuiltInAutoRoundModifier(**settings, **_targets(task)))
    return settings


def gptq(task: Task, **options: Any) -> dict[str, Any]:
    _oneshot(task, GPTQModifier(**options, **_targets(task)))
    return options


def awq(task: Task, **options: Any) -> dict[str, Any]:
    """Activation-aware scaling, then rounding to nearest."""
    if not torch.accelerator.is_available():
        # AWQModifier pins memory even where there is nothing to pin it for, and fails.
        torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[method-assign]
    _oneshot(task, AWQModifier(**options), QuantizationModifier(**_targets(task)))
    return options


def rtn(task: Task, **options: Any) -> dict[str, Any]:
    """LLM-Compressor's rounding to nearest, with its default observer."""
    _oneshot(task, QuantizationModifier(**options, **_targets(task)))
    return options


def _targets(task: Task) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": task.weights}
    return {"ignore": ["lm_head"], "config_groups": {"group_0": group}}


def _oneshot(task: Task, *recipe: Modifier) -> None:
    torch.manual_seed(task.seed)
    llmcompressor.oneshot(
        model=task.model,
        processor=task.tokenizer,
        dataset=task.dataset,
        recipe=list(recipe),
        num_calibration_samples=len(task.dataset),
        max_seq_length=len(task.dataset[0]["input_ids"]),
    )


PEERS: dict[str, Callable[..., dict[str, Any]]] = {
    "auto-round": auto_round,
    "llmcompressor-autoround": built_in_auto_round,
    "llmcompressor-gptq": gptq,
    "llmcompressor-awq": awq,
    "llmcompressor-rtn": rtn,
}
