"""
Exported checkpoints in one engine: divergence from reference log-probabilities.

    python export_engines.py ENGINE REFERENCES PATH...

Runs in the environment of the engine. ``REFERENCES`` holds ``tokens.npy``, (sequences, length), and
log-probabilities of each next token, (sequences, length - 1, vocabulary), in float32:
``unquantized.npy``, ``dequantized.npy``. Prints a line of JSON for each path.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PREFIX = "divergence: "  # of a line with a result
Logits = Iterator[NDArray[Any]]  # of each sequence, (length or length - 1, vocabulary)


def transformers(path: Path, tokens: NDArray[np.int64]) -> Logits:
    """In float32. What a checkpoint is quantized with is read by the installed packages."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32}
    if path.suffix == ".gguf":
        options["gguf_file"], path = path.name, path.parent
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **options).eval()
    for ids in tokens:
        with torch.no_grad():
            yield model(torch.tensor(ids)[None]).logits[0].float().numpy()


def llama_cpp(path: Path, tokens: NDArray[np.int64]) -> Logits:
    from llama_cpp import Llama

    length = tokens.shape[1]
    model = Llama(str(path), n_ctx=length, logits_all=True, n_threads=1, verbose=False)
    for ids in tokens:
        model.reset()
        model.eval(ids.tolist())
        yield model.scores[:length]


def mlx(path: Path, tokens: NDArray[np.int64]) -> Logits:
    """In float32: in bfloat16 its CPU package adds up products in bfloat16 as well."""
    import mlx.core as mx
    from mlx_lm import load

    mx.set_default_device(mx.cpu)
    model, _ = load(str(path))
    model.set_dtype(mx.float32)
    for ids in tokens:
        yield np.array(model(mx.array(ids)[None])[0])


def vllm(path: Path, tokens: NDArray[np.int64]) -> Logits:
    """In bfloat16. Log-probabilities of a prompt come from the model's own logits."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CPU_INT4_W4A8="0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    from vllm import LLM, SamplingParams

    model = LLM(str(path), dtype="bfloat16", enforce_eager=True, max_num_seqs=1, max_model_len=256)
    seen: list[NDArray[Any]] = []

    def watch(module: Any) -> None:
        compute = module.compute_logits

        def recorded(*arguments: Any, **options: Any) -> Any:
            found = compute(*arguments, **options)
            seen.append(found.float().numpy())
            return found

        module.compute_logits = recorded

    model.apply_model(watch)
    for ids in tokens:
        seen.clear()
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=1)
        model.generate([{"prompt_token_ids": ids.tolist()}], sampling, use_tqdm=False)
        yield max(seen, key=len)
    model.llm_engine.engine_core.shutdown()


ENGINES: dict[str, Callable[[Path, NDArray[np.int64]], Logits]] = {
    "transformers": transformers,
    "llama_cpp": llama_cpp,
    "mlx": mlx,
    "vllm": vllm,
}


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    shifted = logits.astype(np.float32) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def main() -> None:
    engine, folder = sys.argv[1], Path(sys.argv[2])
    tokens = np.load(folder / "tokens.npy")
    references = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("unquantized", "dequantized")
    }
    for path in map(Path, sys.argv[3:]):
        sums = dict.fromkeys(references, 0.0)
        for number, logits in enumerate(ENGINES[engine](path, tokens)):
            ours = log_softmax(logits[: tokens.shape[1] - 1])
            for name, reference in references.items():
                theirs = reference[number]
                terms = (np.exp(theirs) * (theirs - ours)).sum(-1, dtype=np.float64)
                sums[name] += float(terms.mean())
        found = {name: total / len(tokens) for name, total in sums.items()}
        print(f"\n{PREFIX}{json.dumps({'path': str(path), **found})}", flush=True)


if __name__ == "__main__":
    main()
