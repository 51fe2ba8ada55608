"""
The other ways to quantize that `accuracy.py` compares with. Each leaves the model with its
quantized weights, dequantized, and returns the settings it ran with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmcompressor
import torch
from datasets import Dataset
from gsq import gsq
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

__all__ = ["PEERS", "Task", "auto_round_scheme"]

ROOT = Path(__file__).parent.parent
CHILD = str(ROOT / "benchmarks" / "auto_round_child.py")
# An environment with `auto-round` alone, made by `make auto-round`
AUTO_ROUND_PYTHON = os.environ.get(
    "AUTO_ROUND_PYTHON", str(ROOT / ".venv-auto-round" / "bin" / "python")
)


@dataclass
class Task:
    """
    :param model_folder: where ``model`` was loaded from
    :param dataset: calibration samples of equal length
    :param weights: fields of compressed-tensors' `QuantizationArgs`
    :param seed: fixes the peer's random choices, where it has a way to
    """

    model_folder: Path
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    weights: dict[str, Any]
    batch_size: int
    seed: int


def auto_round(task: Task, **options: Any) -> dict[str, Any]:
    """
    Intel's library by itself, in its own environment; ``iters``, ``lr`` and ``enable_alg_ext`` are
    its own arguments.
    """
    settings = {
        **auto_round_scheme(task.weights),
        "batch_size": task.batch_size,
        "seed": task.seed,
        **options,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = {"model": str(task.model_folder), "settings": settings}
        (folder / "task.json").write_text(json.dumps(content))
        tokens = torch.tensor(task.dataset["input_ids"])
        save_file({"input_ids": tokens}, folder / "tokens.safetensors")
        subprocess.run([AUTO_ROUND_PYTHON, CHILD, str(folder)], check=True, stdout=sys.stderr)
        weights = load_file(folder / "weights.safetensors")
        result = json.loads((folder / "result.json").read_text())
    if not weights:
        raise RuntimeError("auto-round changed no weight")
    task.model.load_state_dict(weights, strict=False)
    return {**settings, **result}


def auto_round_scheme(weights: dict[str, Any]) -> dict[str, Any]:
    """:return: arguments of `AutoRound` for these weights, with activations in 16 bits"""
    if weights["type"] == "float":
        if weights["num_bits"] != 4:
            raise SystemExit("auto-round is compared in integers, MXFP4 and NVFP4")
        if weights["group_size"] == 32:
            return {"scheme": "MXFP4", "act_bits": 16}
        # With the scheme's own type of activations it would go back to 4 bits.
        return {"scheme": "NVFP4", "act_bits": 16, "act_data_type": "float"}
    return {
        "scheme": "W4A16",  # the fields below override all of it
        "bits": weights["num_bits"],
        "sym": weights["symmetric"],
        "group_size": weights["group_size"],
    }


def built_in_auto_round(task: Task, **options: Any) -> dict[str, Any]:
    """LLM-Compressor's own modifier, a wrapper around Intel's library, which it imports."""
    from llmcompressor.modifiers.autoround import AutoRoundModifier as BuiltInAutoRoundModifier

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
    "gsq": gsq,
    "llmcompressor-autoround": built_in_auto_round,
    "llmcompressor-gptq": gptq,
    "llmcompressor-awq": awq,
    "llmcompressor-rtn": rtn,
}
