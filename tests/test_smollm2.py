"""The whole way on a real model: SmolLM2-135M, all blocks, few iterations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import integers, quantized_layers, saved_integers, saved_tensors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from autoround_modifier import load_recipe, oneshot, self_generated
from autoround_modifier.evaluation import compare


@pytest.fixture(scope="module")
def smollm2() -> tuple[Path, PreTrainedModel, PreTrainedTokenizerBase]:
    """Folder, original model and tokenizer."""
    from smollm2 import load, save_smollm2

    folder = save_smollm2()
    return folder, *load(folder)


@pytest.mark.smollm2
def test_two_bits_end_to_end(smollm2, tmp_path):
    folder, original, tokenizer = smollm2
    text = self_generated(original, tokenizer, num_samples=12, max_seq_length=48)
    evaluation = torch.tensor(text.select(range(4))["input_ids"])
    dataset = text.select(range(4, 12))

    kl = {}
    for name, fields in {"rtn": {"preset": "rtn"}, "tuned": {"iters": 6, "batch_size": 4}}.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        recipe = load_recipe("w2a16_autoround", **fields)
        data = None if name == "rtn" else dataset
        oneshot(model=model, tokenizer=tokenizer, dataset=data, recipe=recipe)
        kl[name] = compare(original, model, evaluation).kl
    assert kl["tuned"] < 0.8 * kl["rtn"]

    before = {name: integers(layer) for name, layer in quantized_layers(model).items()}
    assert len(before) == 210
    model.save_pretrained(tmp_path, save_compressed=True)
    tensors = saved_tensors(tmp_path)
    for name, values in before.items():
        assert torch.equal(saved_integers(tensors, name, 2), values)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert compare(original, reloaded, evaluation).kl == pytest.approx(kl["tuned"], rel=0.02)


@pytest.mark.smollm2
def test_the_tokenizer_is_one_of_bytes(smollm2):
    """As the package has it, but for what llama.cpp's converter takes for SentencePiece."""
    from smollm2 import packaged_gguf

    folder, _, tokenizer = smollm2
    packaged = AutoTokenizer.from_pretrained(packaged_gguf().parent, gguf_file=packaged_gguf().name)
    written = json.loads((folder / "tokenizer.json").read_text())
    assert written["model"]["byte_fallback"] is False
    texts = ["Hello 12345 w\u00f6rld \U0001f600 \x00\xff", " two  spaces\n\n\u65e5\u672c\u2581x"]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == packaged(text).input_ids
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
@pytest.mark.smollm2
def test_presets_in_order(smollm2):
    """At 4 bits: light is better than opt_rtn, and that is better than rtn."""
    folder, original, tokenizer = smollm2
    text = self_generated(original, tokenizer, num_samples=64, max_seq_length=128)
    evaluation = torch.tensor(text.select(range(16))["input_ids"])
    dataset = text.select(range(16, 64))
    kl = {}
    for preset in ("rtn", "opt_rtn", "light"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        recipe = load_recipe("w4a16_autoround", preset=preset)
        oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe)
        kl[preset] = compare(original, model, evaluation).kl
    assert kl["light"] < kl["opt_rtn"] < kl["rtn"]
