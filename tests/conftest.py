"""Tiny random models and data: every default test runs on the CPU in seconds."""

from __future__ import annotations

import atexit
import functools
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from llmcompressor.core import reset_session
from loguru import logger
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from autoround_modifier import oneshot
from autoround_modifier.formats import QuantizedWeight
from autoround_modifier.modifiers import auto_scheme, layer_quantizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

VOCABULARY = 128


@functools.cache
def tiny_llama_folder(
    dtype: torch.dtype,
    num_layers: int,
    seed: int,
    tied: bool,
    hidden_size: int = 64,
    rope_theta: float = 10_000.0,
) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny_llama_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_llama(
    dtype: torch.dtype = torch.bfloat16,
    num_layers: int = 2,
    seed: int = 0,
    tied: bool = False,
    hidden_size: int = 64,
    rope_theta: float = 10_000.0,
) -> PreTrainedModel:
    """A random Llama whose linear layers have 64 or 128 input features, loaded from disk."""
    folder = tiny_llama_folder(dtype, num_layers, seed, tied, hidden_size, rope_theta)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def tiny_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerBase:
    """The words ``w3`` to ``w127``, or up to another size, each with its number as token id."""
    special = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    vocabulary = special | {f"w{index}": index for index in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


def token_samples(num_samples: int = 16, length: int = 12, seed: int = 1) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (num_samples, length), generator=generator)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )


def weight_scheme(
    num_bits: int = 4,
    symmetric: bool = True,
    group_size: int | None = 32,
    targets: Iterable[str] = ("Linear",),
) -> dict:
    """One entry of ``config_groups``; strategy ``channel`` if there is no group size."""
    weights: dict = {"num_bits": num_bits, "type": "int", "symmetric": symmetric}
    if group_size is None:
        weights["strategy"] = "channel"
    else:
        weights |= {"strategy": "group", "group_size": group_size}
    return {"targets": list(targets), "weights": weights}


@pytest.fixture(autouse=True)
def _seeded():
    """Random weights and gradients without a generator are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_session():
    """LLM-Compressor keeps one global session; a failed run must not leak into the next test."""
    yield
    reset_session()


@pytest.fixture(autouse=True)
def _own_score_cache(monkeypatch, tmp_path):
    """Scores measured in a test are not kept for others, nor for the user."""
    monkeypatch.setattr(auto_scheme, "default_cache_folder", lambda: tmp_path / "score_cache")


def quantize(model: PreTrainedModel, recipe, dataset=None, **kwargs) -> PreTrainedModel:
    """`oneshot` on tiny data, in the order given."""
    kwargs = {"shuffle_calibration_samples": False, "check_generation": False, **kwargs}
    return oneshot(
        model=model,
        recipe=recipe,
        dataset=token_samples() if dataset is None else dataset,
        processor=tiny_tokenizer(),
        **kwargs,
    )


@pytest.fixture
def written(monkeypatch) -> dict[torch.nn.Module, tuple[QuantizedWeight, int]]:
    """What the modifier wrote back, by module: the tuned weight, and how many integers moved."""
    recorded = {}
    original = layer_quantizer.write_back

    def spy(module, weight, args):
        moved = original(module, weight, args)
        recorded[module] = (weight, moved)
        return moved

    monkeypatch.setattr(layer_quantizer, "write_back", spy)
    return recorded


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Messages logged during the test."""
    messages: list[str] = []
    sink = logger.add(messages.append, format="{level} {message}")
    yield messages
    logger.remove(sink)
