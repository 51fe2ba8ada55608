"""
`llama-quantize`, and what llama.cpp computes from GGUF files, by llama-cpp-python.

    python gguf_llama.py quantize INPUT OUTPUT SCHEME BLOCKS [IMATRIX]
    python gguf_llama.py reference TOKENS FILE REFERENCE
    python gguf_llama.py measure TOKENS FILE REFERENCE

Runs in the environment of llama-cpp-python (`make bench-gguf`), in one thread. ``BLOCKS`` is the
number of decoder blocks, ``IMATRIX`` an importance matrix, an ``.npz`` file of (in_features,) by
tensor name. ``TOKENS`` is an ``.npy`` file, (sequences, length); ``REFERENCE`` another, of the
log-probabilities of each next token, (sequences, length - 1, vocabulary), in float32. Prints a line
of JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator

import llama_cpp
import numpy as np
from export_engines import PREFIX, log_softmax

FILE_TYPES = {
    "q2_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "q2_k_s": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K_S,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
Q2_K, Q4_K, Q8_0 = 10, 12, 8  # `ggml_type`
ROWS = 64  # of logits that are compared at a time


def q2_k_s_overrides(blocks: int) -> list[tuple[str, int]]:
    """
    llama-quantize refuses Q2_K_S without an importance matrix, and not Q2_K, whose `attn_output`
    and `ffn_down` have more bits.

    :return: what its ``--tensor-type`` needs to make Q2_K that mixture: pattern, `ggml_type`
    """
    first = "|".join(map(str, range(blocks // 8)))
    raised = [(rf"blk\.({first})\.ffn_down", Q4_K)] if first else []
    return [*raised, ("ffn_down|attn_output", Q2_K)]


def quantize(
    source: str, output: str, scheme: str, blocks: str, imatrix: str | None = None
) -> dict:
    """:return: seconds, and those of the processor"""
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = 1
    options.token_embedding_type = options.output_tensor_type = Q8_0
    if imatrix is not None:
        found = {name: np.float32(x).copy() for name, x in np.load(imatrix).items()}
        items = (llama_cpp.llama_model_imatrix_data * (len(found) + 1))()
        for item, (name, values) in zip(items, found.items(), strict=False):
            item.name = name.encode()
            item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            item.size = values.size
        options.imatrix = items
    elif scheme == "q2_k_s":
        scheme = "q2_k"
        pairs = q2_k_s_overrides(int(blocks))
        overrides = (llama_cpp.llama_model_tensor_override * (len(pairs) + 1))()
        for override, (pattern, kind) in zip(overrides, pairs, strict=False):
            override.pattern, override.type = pattern.encode(), kind
        options.tt_overrides = overrides
    options.ftype = FILE_TYPES[scheme]
    started, cpu_started = time.perf_counter(), time.process_time()
    if llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(options)):
        raise SystemExit(f"llama_model_quantize failed on {source}")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


def log_probabilities(file: str, tokens: np.ndarray) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Yield the number of a sequence, positions of it, and (positions, vocabulary), in float32."""
    length = tokens.shape[1]
    threads = {"n_threads": 1, "n_threads_batch": 1}
    sizes = {"n_ctx": length, "n_batch": length, "logits_all": True}
    model = llama_cpp.Llama(file, **sizes, **threads, verbose=False)
    for number, ids in enumerate(tokens):
        model.reset()
        model.eval(ids.tolist())
        for start in range(0, length - 1, ROWS):
            rows = slice(start, min(start + ROWS, length - 1))
            yield number, rows, log_softmax(model.scores[rows])


def save_reference(tokens_file: str, file: str, reference: str) -> dict:
    tokens = np.load(tokens_file)
    stored = None
    for number, rows, found in log_probabilities(file, tokens):
        if stored is None:
            shape = (len(tokens), tokens.shape[1] - 1, found.shape[1])
            stored = np.lib.format.open_memmap(reference, "w+", np.float32, shape)
        stored[number, rows] = found
    return {}


def measure(tokens_file: str, file: str, reference: str) -> dict:
    """:return: perplexity, KL divergence from the reference, share of equal top tokens"""
    tokens, stored = np.load(tokens_file), np.load(reference, mmap_mode="r")
    losses, divergences, same = (np.zeros(len(tokens)) for _ in range(3))
    for number, rows, ours in log_probabilities(file, tokens):
        theirs = stored[number, rows]
        wanted = tokens[number, rows.start + 1 : rows.stop + 1, None]
        losses[number] -= np.take_along_axis(ours, wanted, 1).sum(dtype=np.float64)
        divergences[number] += (np.exp(theirs) * (theirs - ours)).sum(dtype=np.float64)
        same[number] += (ours.argmax(-1) == theirs.argmax(-1)).sum()
    counted = tokens.shape[1] - 1
    return {
        "perplexity": float(np.exp(losses.mean() / counted)),
        "kl": float(divergences.mean() / counted),
        "kl_per_sample": (divergences / counted).tolist(),
        "top1": float(same.mean() / counted),
    }


COMMANDS = {"quantize": quantize, "reference": save_reference, "measure": measure}


def main() -> None:
    command, *rest = sys.argv[1:]
    print(f"\n{PREFIX}{json.dumps(COMMANDS[command](*rest))}", flush=True)


if __name__ == "__main__":
    main()
