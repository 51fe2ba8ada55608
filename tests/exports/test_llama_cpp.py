"""
GGUF files in llama.cpp: weights as ggml's own code dequantizes them, log-probabilities of the
model, and text of SmolLM2.

llama.cpp rounds activations to 8 bits, so its log-probabilities differ from those of the same
weights elsewhere; weights are compared exactly.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from ggml import quantized_tensors
from llama_cpp import Llama
from safetensors import safe_open
from safetensors.numpy import load_file

ENGINE = "llama_cpp"
PACKAGES = ("llama-cpp-python",)
GGUF = ("gguf:",)
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Mean Kullback-Leibler divergence in nats: what activations of 8 bits do to a random model.
# Measured: up to 0.01.
DIVERGENCE = 0.05
PROMPT = "The capital of France is"


def in_order_of_llama_cpp(weight, part: str, config: dict):
    """Rows of queries and keys, whose rotary halves llama.cpp interleaves."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
    if heads is None:
        return weight
    halves = weight.reshape(config[heads], 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def compared_weights(case) -> tuple[set[str], int]:
    """
    :return: types of the quantized tensors, and their number
    :raises AssertionError: if one has other numbers than the dequantized model
    """
    config = json.loads((case.folder / "dense" / "config.json").read_text())
    types, count = set(), 0
    with safe_open(case.folder / "dense" / "model.safetensors", "numpy") as dense:
        for name, kind, values in quantized_tensors(case.path):
            _, block, part, _ = name.split(".")
            weight = dense.get_tensor(f"model.layers.{block}.{NAMES[part]}.weight")
            weight = in_order_of_llama_cpp(weight, part, config)
            assert np.array_equal(values.reshape(weight.shape), weight), name
            types.add(kind)
            count += 1
    return types, count


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.cases(GGUF)
def test_weights(case, record):
    types, count = compared_weights(case)
    record(case, "weights", kernels=sorted(types))
    assert count


@pytest.mark.cases(GGUF)
def test_log_probabilities(case, record):
    reference = load_file(case.folder / "reference.safetensors")
    length = reference["token_ids"].shape[1]
    model = Llama(str(case.path), n_ctx=length, logits_all=True, n_threads=1, verbose=False)
    divergences = []
    for ids, expected in zip(reference["token_ids"], reference["logits"], strict=True):
        model.reset()
        model.eval(ids.tolist())
        ours, theirs = (log_softmax(x) for x in (model.scores[:length], expected))
        divergences.append((np.exp(theirs) * (theirs - ours)).sum(-1).mean())
    divergence = float(np.mean(divergences))
    record(case, "run", divergence=divergence)
    assert divergence <= DIVERGENCE


@pytest.mark.cases(GGUF, smollm2=True)
def test_smollm2(case, record):
    """Tokens of a text, with a wrong vocabulary llama.cpp aborts; weights; and text of its own."""
    expected = json.loads((case.folder / "text.json").read_text())
    compared_weights(case)
    model = Llama(str(case.path), n_ctx=256, n_threads=1, verbose=False)
    text = expected["text"].encode()
    assert model.tokenize(text, add_bos=False) == expected["token_ids"]
    found = model.create_completion(PROMPT, max_tokens=16, temperature=0)["choices"][0]["text"]
    record(case, "text", text=found)
    assert len(found.split()) > 2
